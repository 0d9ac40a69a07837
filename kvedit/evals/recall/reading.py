"""Reading: next-token distributions along given answers, and greedy answers, over one memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvedit.memory import KVMemory
from kvedit.models.inspection import Inspection
from kvedit.runtime.attaching import open_session
from kvedit.runtime.session import Reply

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Ids", "Listener"]

Ids = tuple[int, ...]
_Row = tuple[int, Ids]  # a question, and the tokens of an answer that are fed behind it


@dataclass(frozen=True, eq=False)
class Listener:
    """A model that reads questions over memories, all questions of a batch as rows.

    Args:
        model: the model.
        inspection: its facts.
        tokenizer: its tokenizer.
        batch_size: rows per forward pass.
        strict: whether the compatibility gate holds.
    """

    model: PreTrainedModel
    inspection: Inspection
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    strict: bool

    def read(
        self,
        memory: KVMemory | None,
        prompts: Sequence[Ids],
        answers: Sequence[Sequence[Ids]],
    ) -> list[Mapping[Ids, torch.Tensor]]:
        """Returns the distributions from which each token of each answer would be drawn.

        Args:
            memory: a memory, or None for nothing.
            prompts: ids of each question.
            answers: per question the answers, none of them empty.

        Returns:
            Per question, each answer's ``[token, vocabulary]`` float32 log-probabilities.
        """
        rows = [row for index, texts in enumerate(answers) for row in _rows(index, texts)]
        tails: dict[_Row, torch.Tensor] = {}
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            tails.update(zip(batch, self._tails(memory, prompts, batch), strict=True))
        return [_collect(tails, index, texts) for index, texts in enumerate(answers)]

    def _tails(
        self, memory: KVMemory | None, prompts: Sequence[Ids], rows: Sequence[_Row]
    ) -> list[torch.Tensor]:
        # Padding stands on the left, so that the logits that matter are the last ones.
        fed = [(*prompts[question], *answer) for question, answer in rows]
        width = max(map(len, fed))
        ids = torch.zeros(len(fed), width, dtype=torch.int64)
        valid = torch.zeros(len(fed), width, dtype=torch.bool)
        for index, tokens in enumerate(fed):
            ids[index, width - len(tokens) :] = torch.tensor(tokens)
            valid[index, width - len(tokens) :] = True
        keep = 1 + max(len(answer) for _, answer in rows)
        memories = [memory] * len(rows)
        with open_session(self.model, self.inspection, memories, None, self.strict) as session:
            logits = session.forward(ids, valid, keep=keep)
        logprobs = logits.float().log_softmax(dim=-1)
        return [logprobs[i, keep - 1 - len(answer) :] for i, (_, answer) in enumerate(rows)]

    def reply(
        self,
        memory: KVMemory | None,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        stop: str | None,
    ) -> list[Reply]:
        """Returns the greedy answer to each question.

        Args:
            memory: a memory, or None for nothing.
            prompts: ids of each question.
            max_new_tokens: tokens of an answer.
            stop: text that ends it; the token that completes it is the answer's last.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop}
        found: list[Reply] = []
        for start in range(0, len(prompts), self.batch_size):
            asked = [torch.tensor(ids) for ids in prompts[start : start + self.batch_size]]
            memories = [memory] * len(asked)
            with open_session(
                self.model, self.inspection, memories, self.tokenizer, self.strict
            ) as session:
                replies: Any = session.generate(asked, do_sample=False, **options)
            found += replies if isinstance(replies, list) else [replies]
        return found if stop is None else [self._until(reply, stop) for reply in found]

    def _until(self, reply: Reply, stop: str) -> Reply:
        # A row that stopped before others was padded up to their length.
        for end in range(1, len(reply.tokens)):
            if stop in str(self.tokenizer.decode(reply.tokens[:end], skip_special_tokens=True)):
                return Reply(reply.text, reply.tokens[:end])
        return reply


def _rows(question: int, answers: Sequence[Ids]) -> list[_Row]:
    """Returns what must be fed so that every answer's tokens have been predicted."""
    needed = dict.fromkeys(answer[:-1] for answer in answers)
    # The first token is predicted behind the prompt, which is in every row.
    return [(question, fed) for fed in needed if fed or len(needed) == 1]


def _collect(
    tails: Mapping[_Row, torch.Tensor], question: int, answers: Sequence[Ids]
) -> dict[Ids, torch.Tensor]:
    own = {fed: tails[question, fed] for _, fed in _rows(question, answers)}
    any_row = next(iter(own.values()))
    return {answer: own.get(answer[:-1], any_row)[: len(answer)] for answer in answers}
