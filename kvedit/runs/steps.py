"""The steps of a run, as plain functions: load, read, capture, edit, ask, compare."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.divergence import token_divergence
from kvedit.memory import KVMemory
from kvedit.memory.digest import digest_tensor
from kvedit.runtime import attach, score
from kvedit.runtime import capture as capture_memory
from kvedit.runtime.text import Context, encode_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Answer",
    "Drift",
    "Loaded",
    "Question",
    "answer",
    "capture",
    "diverge",
    "edit",
    "first_logits",
    "likelihood",
    "load_model",
    "lossless",
    "operands",
    "prefill",
    "read_document",
]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model, ready to run.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        seconds: what loading took.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seconds: float


@dataclass(frozen=True)
class Question:
    """A question, and the two ways in which its answer could go on.

    Args:
        text: the question.
        lead: how the scored answer begins.
        target: what should follow; None scores nothing.
        rival: what should not; None scores the target alone.
    """

    text: str
    lead: str = ""
    target: str | None = None
    rival: str | None = None

    def __post_init__(self) -> None:
        """Checks that there is a question."""
        if not isinstance(self.text, str) or not self.text.strip():
            raise InvalidArgument(
                f"questions.edited.text: expected a question, found {self.text!r}"
            )
        if self.rival is not None and self.target is None:
            raise InvalidArgument("questions.edited.rival is given without a target")


@dataclass(frozen=True)
class Answer:
    """What the model says to a question.

    Args:
        text: the greedy answer.
        tokens: its ids.
        logits: digest of the logits of the first token, all bits of them.
    """

    text: str
    tokens: tuple[int, ...]
    logits: str


@dataclass(frozen=True)
class Drift:
    """How far two memories' next-token distributions are apart, over the tokens of answers.

    Args:
        kl: mean KL divergence of the second from the first, in nats per token.
        worst: largest KL divergence of one token, in nats.
        agreement: fraction of tokens in [0, 1] with the same most likely token.
        tokens: number of tokens compared.
    """

    kl: float
    worst: float
    agreement: float
    tokens: int


def load_model(
    name: str,
    dtype: str | None = None,
    device: str | None = None,
    attn: str | None = None,
    revision: str | None = None,
) -> Loaded:
    """Returns the model of that name; see :func:`kvedit.load`."""
    from transformers.utils.logging import disable_progress_bar

    from kvedit.models.loading import load

    disable_progress_bar()
    started = time.perf_counter()
    model, tokenizer = load(name, dtype=dtype, device=device, attn=attn, revision=revision)
    return Loaded(model, tokenizer, time.perf_counter() - started)


def read_document(
    path: str | None = None,
    text: str | None = None,
    role: str | None = None,
    instruction: str | None = None,
) -> Context:
    """Returns a document as a context: a text, or chat messages.

    Args:
        path: a text file, or a ``.json`` file with chat messages, which are taken as they are.
        text: the text; ignored where a path is given.
        role: the text becomes a message of this role; None leaves it a text.
        instruction: put before the text, with an empty line between.

    Raises:
        InvalidArgument: if there is no document, or it can't be read.
    """
    if path is not None:
        try:
            content = Path(path).read_text(encoding="utf-8")
            if Path(path).suffix == ".json":
                messages: list[Mapping[str, Any]] = json.loads(content)
                return messages
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"document.path={path}: {error}") from error
        text = content
    if not isinstance(text, str) or not text.strip():
        raise InvalidArgument(
            "no document: choose a recipe (recipes=quickstart), or set document.path or "
            "document.text"
        )
    whole = f"{instruction.strip()}\n\n{text.strip()}" if instruction else text.strip()
    return whole if role is None else [{"role": role, "content": whole}]


def capture(
    loaded: Loaded,
    context: Context,
    chunk: int = 1024,
    window: Literal["whole", "windowed"] = "whole",
    dtype: str | None = None,
) -> KVMemory:
    """Returns the model's memory of a context; see :func:`kvedit.capture`."""
    from kvedit.models.loading import as_dtype

    memory: KVMemory = capture_memory(
        loaded.model, loaded.tokenizer, context, chunk=chunk, window=window, dtype=as_dtype(dtype)
    )
    return memory


def edit(
    loaded: Loaded, memory: KVMemory, editor: Any, operands: Sequence[KVMemory] = ()
) -> KVMemory:
    """Returns the edited memory; editors that read get the model, others what they compute with."""
    from kvedit.runtime import ModelReader

    reads = editor.reproducibility == "reader" or getattr(editor, "reads", False)
    reader = ModelReader(loaded.model, loaded.tokenizer) if reads else None
    edited: KVMemory = editor(memory, *operands, reader=reader)
    return edited


def operands(loaded: Loaded, editor: Any, path: str, say: Callable[[str], None]) -> list[KVMemory]:
    """Returns an editor's operands from the store at ``path``, made once where it lacks them."""
    if not editor.operands:
        return []
    from kvedit.runs.operands import supply
    from kvedit.store import Store

    with Store(path) as store:
        return supply(editor, store, loaded.model, loaded.tokenizer, say)


def first_logits(loaded: Loaded, memory: KVMemory, question: str) -> torch.Tensor:
    """Returns the logits ``[vocabulary]`` that follow a memory and a question."""
    with attach(loaded.model, memory, loaded.tokenizer) as session:
        return session.feed([question])[0]


def prefill(loaded: Loaded, memory: KVMemory, question: str) -> torch.Tensor:
    """Returns the logits ``[vocabulary]`` of the whole context and question, run from nothing.

    Of the memory, only its tokens are used: this is what a run without memories has to do.
    """
    ids = encode_turn(loaded.tokenizer, memory.source, question).tokens[None]
    with torch.no_grad():
        output = loaded.model(input_ids=ids.to(loaded.model.device), logits_to_keep=1)
    logits: torch.Tensor = output.logits[0, -1]
    return logits


def lossless(loaded: Loaded, memory: KVMemory, question: str) -> float:
    """Returns the largest difference of a logit between memory and full prefill."""
    full, reused = (way(loaded, memory, question).float() for way in (prefill, first_logits))
    return float((full - reused).abs().max())


def answer(
    loaded: Loaded,
    memory: KVMemory,
    question: str,
    max_new_tokens: int = 32,
    stop: Sequence[str] | None = None,
) -> Answer:
    """Returns the greedy answer to a question over a memory."""
    logits = digest_tensor(first_logits(loaded, memory, question))
    with attach(loaded.model, memory, loaded.tokenizer) as session:
        reply: Any = session.generate(question, max_new_tokens=max_new_tokens, stop=stop)
    # Decoded anew: a stop string, such as a full stop, stays in the text.
    text = str(loaded.tokenizer.decode(reply.tokens, skip_special_tokens=True)).strip()
    return Answer(text, reply.tokens, logits)


def likelihood(loaded: Loaded, memory: KVMemory, question: Question) -> dict[str, float]:
    """Returns the log-probabilities, in nats, of target and rival behind the question's lead."""
    lead = _ids(loaded, question.lead)
    wanted = {"target": question.target, "rival": question.rival}
    found = {}
    for name, text in wanted.items():
        if text is not None:
            whole = torch.tensor([*lead, *_ids(loaded, text)])
            (scored,) = score(loaded.model, loaded.tokenizer, memory, question.text, [whole])
            found[name] = float(scored.logprobs[len(lead) :].sum())
    return found


def diverge(
    loaded: Loaded, before: KVMemory, after: KVMemory, answers: Mapping[str, Answer]
) -> Drift | None:
    """Returns how far ``after`` is from ``before`` over given answers; None without any.

    Args:
        loaded: the model.
        before: the memory that gave the answers.
        after: the other one, which is read along the same tokens.
        answers: question to answer.
    """
    divergences, same = [], []
    for question, given in answers.items():
        ids = torch.tensor(given.tokens)
        first, second = (
            score(loaded.model, loaded.tokenizer, memory, question, [ids])[0].logits
            for memory in (before, after)
        )
        kl, agreed = token_divergence(first, second)
        divergences.append(kl)
        same.append(agreed)
    if not divergences:
        return None
    kl, agree = torch.cat(divergences), torch.cat(same)
    return Drift(float(kl.mean()), float(kl.max()), float(agree.double().mean()), len(kl))


def _ids(loaded: Loaded, text: str) -> list[int]:
    return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
