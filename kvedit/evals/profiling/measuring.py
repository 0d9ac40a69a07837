"""measure: what emphasis in each of many head sets does on one probe, as rows of one batch.

The context, and the prompt up to where steering begins, is read once. Then every head set is one
row that continues the same keys and values under its own bias. Adding ``b`` to the span's logits
multiplies its attention by ``e^b`` and renormalises (PASTA, arXiv 2311.02262, eq. 2, with
``b = -log(alpha)`` and every other key as the reference).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvedit.errors import InvalidArgument, SpanNotFound
from kvedit.evals.divergence import token_divergence
from kvedit.evals.profiling.candidates import head_masks
from kvedit.evals.profiling.probe import Probe
from kvedit.memory import KVMemory, Source, Span
from kvedit.memory.heads import HeadSet
from kvedit.runtime.attaching import attach
from kvedit.runtime.capturing import capture
from kvedit.runtime.session import Session
from kvedit.runtime.text import encode_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Case", "Setting", "measure"]


_CACHE_BYTES = 256 << 20
"""Keys and values that the rows of one forward pass may hold together."""

_Row = tuple[HeadSet | None, float]


@dataclass(frozen=True)
class Setting:
    """How a head set is tried; everything here changes the numbers, but for ``rows``.

    Args:
        strength: bias in nats on the span's logits; PASTA's alpha is ``exp(-strength)``.
        rerun: what is read under the bias: ``"last"``, the last token of the prompt and the
            continuation, or ``"prompt"``, all of the prompt too. The first costs one token per
            head set and probe, and is not what a steered memory does to a whole prompt.
        continuation: whether the log-probability of the ``"whole"`` continuation counts, or of
            its ``"first"`` token, as in PASTA's efficacy score.
        rows: head sets per forward pass at most; fewer where their copies of the context's keys
            and values would take more than 256 MiB.

    Raises:
        InvalidArgument: if a part is out of range.
    """

    strength: float
    rerun: Literal["last", "prompt"] = "last"
    continuation: Literal["whole", "first"] = "whole"
    rows: int = 128

    def __post_init__(self) -> None:
        """Checks ranges."""
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise InvalidArgument(f"strength must be above 0, in nats; found {self.strength}")
        if self.rerun not in ("last", "prompt"):
            raise InvalidArgument(f"rerun must be 'last' or 'prompt', found {self.rerun!r}")
        if self.continuation not in ("whole", "first"):
            raise InvalidArgument(
                f"continuation must be 'whole' or 'first', found {self.continuation!r}"
            )
        if self.rows < 1:
            raise InvalidArgument(f"rows must be at least 1, found {self.rows}")


@dataclass(frozen=True)
class Case:
    """What was measured on one probe.

    Args:
        base: log p(wanted) - log p(rival) without steering, in nats.
        margins: the same under each head set.
        kl: KL(unsteered‖steered) in nats of the token after the unrelated prompt, under each head
            set; None where the probe has no unrelated prompt.
        seconds: wall time of the measurement.
    """

    base: float
    margins: tuple[float, ...]
    kl: tuple[float, ...] | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {**asdict(self), "margins": list(self.margins), "kl": self.kl and list(self.kl)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        """Returns the case that :meth:`to_json` wrote; other keys are left out.

        Raises:
            InvalidArgument: if a part is missing.
        """
        try:
            kl = None if data["kl"] is None else tuple(data["kl"])
            return cls(data["base"], tuple(data["margins"]), kl, data["seconds"])
        except (KeyError, TypeError) as error:
            raise InvalidArgument(f"expected a measured case, found {sorted(data)}") from error


@dataclass(frozen=True, eq=False)
class _Stem:
    """A memory that was read once, and the tokens that every row reads behind it."""

    memory: KVMemory
    tail: torch.Tensor
    source: Source


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    sets: Sequence[HeadSet],
    setting: Setting,
    strengths: Sequence[float] | None = None,
) -> Case:
    """Returns the effect of every head set on one probe.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        probe: the case.
        sets: head sets to try.
        setting: strength and what is read under it.
        strengths: one strength per set, in nats, in place of the setting's.

    Raises:
        SpanNotFound: if the context does not hold the span.
        InvalidArgument: if continuations can't be told apart.
    """
    started = time.perf_counter()
    context = probe.context
    memory = context if isinstance(context, KVMemory) else capture(model, tokenizer, context)
    span = memory.resolve(probe.span)
    if not any(bool(span.mask(layer).any()) for layer in memory.layers.values()):
        raise SpanNotFound(f"no layer holds a slot of the span {span.text!r} any more")
    given = strengths or (setting.strength,) * len(sets)
    # The first row is the unsteered one.
    rows: list[_Row] = [(None, 0.0), *zip(sets, given, strict=True)]
    stem = _read(model, tokenizer, memory, probe.prompt, setting)
    pair = _continuations(tokenizer, stem, probe, setting)
    swept = _sweep(model, stem, span, rows, setting)
    margins = torch.cat([_margins(session, logits, pair) for session, logits in swept]).tolist()
    kl = None
    if probe.unrelated is not None:
        other = _read(model, tokenizer, memory, probe.unrelated, setting)
        kl = _collateral(_sweep(model, other, span, rows, setting))
    return Case(margins[0], tuple(margins[1:]), kl, time.perf_counter() - started)


def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    memory: KVMemory,
    prompt: str,
    setting: Setting,
) -> _Stem:
    source = encode_turn(tokenizer, memory.source, prompt)
    ids = source.tokens[memory.tokens_count :]
    if setting.rerun == "prompt" or len(ids) == 1:
        return _Stem(memory, ids, source)
    with attach(model, memory, tokenizer) as session:
        session.forward(ids[None, :-1], keep=1)
        return _Stem(session.memory(), ids[-1:], source)


def _continuations(
    tokenizer: PreTrainedTokenizerBase, stem: _Stem, probe: Probe, setting: Setting
) -> tuple[torch.Tensor, torch.Tensor]:
    known = len(stem.source)
    wanted, rival = (
        encode_turn(tokenizer, stem.source, text, chat=False).tokens[known:]
        for text in (probe.wanted, probe.rival)
    )
    if setting.continuation == "first":
        wanted, rival = wanted[:1], rival[:1]
    if torch.equal(wanted, rival):
        raise InvalidArgument(
            f"{probe.wanted!r} and {probe.rival!r} begin with the same token, so their first "
            "tokens tell nothing: use continuation='whole'"
        )
    return wanted, rival


def _sweep(
    model: PreTrainedModel,
    stem: _Stem,
    span: Span,
    rows: Sequence[_Row],
    setting: Setting,
) -> Iterator[tuple[Session, torch.Tensor]]:
    """Yields a session of some rows and the logits ``[row, vocabulary]`` behind their tokens."""
    slots = max(layer.slots for layer in stem.memory.layers.values()) + len(stem.tail)
    row = slots * stem.memory.model.bytes_per_token(model.dtype.itemsize)
    size = max(1, min(setting.rows, _CACHE_BYTES // row))
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        with attach(model, stem.memory, rows=len(chunk)) as session:
            _steer(session, stem.memory, span, chunk)
            logits = session.forward(stem.tail.expand(len(chunk), -1), keep=1)
            yield session, logits[:, -1]


def _steer(session: Session, memory: KVMemory, span: Span, rows: Sequence[_Row]) -> None:
    # Rows share one memory, so that it is checked and laid out once; only the bias is theirs.
    strengths = torch.tensor([strength for _, strength in rows])
    for index, heads in head_masks([heads for heads, _ in rows], memory.model).items():
        slots = span.mask(memory.layers[index]).cpu()
        touched = heads[:, :, None] & slots
        if not bool(touched.any()):
            continue
        bias = touched * strengths[:, None, None]
        kept = memory.layers[index].bias
        session.cache.layers[index].bias = bias if kept is None else bias + kept.cpu()


def _margins(
    session: Session, logits: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    wanted, rival = (_logprob(session, logits, ids) for ids in pair)
    return (wanted - rival).cpu()


def _logprob(session: Session, first: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns ``[row]`` float64 log-probabilities; the session is left as it was."""
    logits = first[:, None]
    if len(ids) > 1:
        rest = session.forward(ids[:-1].expand(session.rows, -1))
        session.cache.crop(1 - len(ids))
        logits = torch.cat((logits, rest), dim=1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(2, ids.to(logits.device).expand(len(logits), -1)[:, :, None])
    found = chosen.squeeze(2).double() - logits.logsumexp(dim=2).double()
    return found.sum(dim=1)


def _collateral(swept: Iterator[tuple[Session, torch.Tensor]]) -> tuple[float, ...]:
    base: torch.Tensor | None = None
    found: list[float] = []
    for _, logits in swept:
        base = logits[:1] if base is None else base
        kl, _ = token_divergence(base.expand_as(logits), logits)
        # Rounding leaves about 1e-7 where nothing changed, also below zero.
        found += kl.clamp_min(0).tolist()
    return tuple(found[1:])
