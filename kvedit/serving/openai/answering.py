"""Answerer: runs one job on the model. Only the line's thread calls it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from kvedit.memory import KVMemory
from kvedit.models.inspection import inspect
from kvedit.runtime import Reply, Session, attach
from kvedit.runtime.attaching import open_session
from kvedit.runtime.text import encode, encode_turn
from kvedit.serving.openai.events import Finished
from kvedit.serving.openai.jobs import Job
from kvedit.serving.openai.memories import Memories
from kvedit.serving.openai.problems import Problem, Refusal
from kvedit.serving.openai.queueing import Ticket
from kvedit.serving.openai.spelling import Speller, cut
from kvedit.serving.openai.watching import Watch
from kvedit.store import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answerer"]


class Answerer:
    """A model with its tokenizer, and the memories that it answers from.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        memories: where memories come from.
        strict: whether the compatibility gate and the model's position limit hold.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        memories: Memories,
        strict: bool = True,
    ) -> None:
        """Runs nothing yet."""
        self.model, self.tokenizer, self.memories = model, tokenizer, memories
        self.strict = strict

    def answer(self, record: Record | None, job: Job, ticket: Ticket) -> None:
        """Answers one job and tells the ticket; says nothing more once it was cancelled.

        Args:
            record: the memory; None for the plain model.
            job: what is asked.
            ticket: who asks.

        Raises:
            KVEditError: if the memory or the prompt is refused.
        """
        if ticket.cancelled:
            return
        memory = None if record is None else self.memories.load(record)
        with self._session(memory) as session:
            ids = self._ids(memory, job)
            tokens = _fitting(session, len(ids), job)
            speller = Speller(self.tokenizer, job.stop)
            watch = self._watch(speller, len(ids), job, ticket)
            reply = self._generate(session, ids, tokens, job, watch)
        if ticket.cancelled:
            return
        ticket.say(
            Finished(
                text=reply.text,
                rest=speller.finish(reply.text),
                tokens=len(reply.tokens),
                prompt=len(ids),
                memory=0 if memory is None else memory.slots,
                reason=self._reason(reply, tokens, job),
                chosen=None if job.logprobs is None else tuple(watch.chosen),
            )
        )

    def _session(self, memory: KVMemory | None) -> AbstractContextManager[Session]:
        if memory is not None:
            return attach(self.model, memory, self.tokenizer, strict=self.strict)
        found = inspect(self.model, self.tokenizer)
        return open_session(self.model, found, [None], self.tokenizer, self.strict)

    def _ids(self, memory: KVMemory | None, job: Job) -> list[int]:
        """Returns the prompt's ids, as they follow the memory."""
        if isinstance(job.prompt, tuple):
            return self._checked(job.prompt)
        if memory is None and isinstance(job.prompt, str):
            # Nothing stands before it, so it begins as a context does: with BOS, if there is one.
            return encode(self.tokenizer, job.prompt).tokens.tolist()
        source = None if memory is None else memory.source
        grown = encode_turn(self.tokenizer, source, job.prompt, chat=job.chat)
        return grown.tokens[0 if source is None else len(source) :].tolist()

    def _checked(self, ids: tuple[int, ...]) -> list[int]:
        known = self.model.get_input_embeddings().num_embeddings
        if not all(0 <= one < known for one in ids):
            message = f"prompt: expected token ids from 0 to {known - 1}"
            raise Refusal(Problem(400, message, "prompt", "invalid_value"))
        return list(ids)

    def _watch(self, speller: Speller, start: int, job: Job, ticket: Ticket) -> Watch:
        told = job.stream or job.logprobs is not None
        return Watch(
            self.tokenizer,
            speller if told else None,
            start,
            job.logprobs,
            ticket.say if job.stream else None,
            lambda: ticket.cancelled,
        )

    def _generate(
        self, session: Session, ids: list[int], tokens: int, job: Job, watch: Watch
    ) -> Reply:
        from transformers import StoppingCriteriaList

        hooks = []
        if job.logprobs is not None:
            hooks.append(self.model.register_forward_hook(watch.hook))
        try:
            reply: Any = session.generate(
                ids,
                max_new_tokens=tokens,
                stop=list(job.stop) or None,
                seed=job.seed,
                stopping_criteria=StoppingCriteriaList([watch]),
                **job.sampling,
            )
        finally:
            for hook in hooks:
                hook.remove()
        found: Reply = reply
        return found

    def _reason(self, reply: Reply, tokens: int, job: Job) -> str:
        """Returns why the answer ended there."""
        end = self.model.generation_config.eos_token_id
        ends = end if isinstance(end, list | tuple) else [end]
        whole = str(self.tokenizer.decode(list(reply.tokens), skip_special_tokens=True))
        stopped = len(reply.tokens) < tokens or cut(whole, job.stop) != whole
        return "stop" if stopped or reply.tokens[-1] in ends else "length"


def _fitting(session: Session, prompt: int, job: Job) -> int:
    """Returns how many new tokens to make at most."""
    limit = session.cache.limit
    if job.exact or limit is None:
        return job.tokens
    room = limit - int(session.cache.next_positions[0]) - prompt + 1
    return max(1, min(job.tokens, room))
