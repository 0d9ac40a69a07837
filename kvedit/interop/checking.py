"""The read-back check: does what was written do what the memory does?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvedit.errors import ContextTooLong
from kvedit.memory import KVMemory, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PROBE", "ReadBack", "check"]

PROBE = "So, in short: what does it say, who is it for, and what happens after 30 days?"
"""What is fed behind both memories. Any text would do: both must answer it alike."""

_RANDOM_PROBES = 24


@dataclass(frozen=True)
class ReadBack:
    """How far two memories are apart in what the model says behind them.

    Args:
        difference: largest absolute difference of logits.
        largest: largest absolute logit behind the first memory, the scale of the difference.
        probes: tokens that were fed.
        agree: fraction of them after which the most likely token is the same.
    """

    difference: float
    largest: float
    probes: int
    agree: float

    @property
    def relative(self) -> float:
        """The difference as a fraction of the largest logit."""
        return self.difference / self.largest if self.largest else self.difference

    def __float__(self) -> float:
        """The difference."""
        return self.difference

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"read back: logits differ by {self.difference:.2g} at most ({self.relative:.2g} of "
            f"the largest), {self.agree:.0%} of {self.probes} tokens the same"
        )


def check(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    memory: KVMemory,
    read_back: KVMemory,
    *,
    probes: torch.Tensor | None = None,
    strict: bool = True,
) -> ReadBack:
    """Returns how far a memory that was read back is from the one that was written.

    Both are attached to the live model, and the same tokens are fed behind them.

    Args:
        model: the model that made the memory.
        tokenizer: its tokenizer; None feeds random tokens.
        memory: the memory that was written.
        read_back: what was read from there.
        probes: ``[n]`` token ids to feed; None feeds :data:`PROBE`.
        strict: whether the compatibility gate holds.

    Raises:
        ContextTooLong: if not one token fits behind the memories.
        IncompatibleModel: if a memory does not fit the model.
    """
    from kvedit.models.inspection import inspect
    from kvedit.runtime.attaching import attach

    spec = inspect(model, tokenizer).spec
    ids = _probes(tokenizer, spec) if probes is None else probes
    room = min(_room(spec, one.next_position) for one in (memory, read_back))
    if room < 1:
        raise ContextTooLong(f"no token fits behind a memory that ends at {memory.next_position}")
    logits = []
    for one in (memory, read_back):
        with attach(model, one, tokenizer, strict=strict) as session:
            logits.append(session.forward(ids[None, :room])[0].float())
    first, second = logits
    return ReadBack(
        difference=float((first - second).abs().max()),
        largest=float(first.abs().max()),
        probes=first.shape[0],
        agree=float((first.argmax(-1) == second.argmax(-1)).float().mean()),
    )


def _probes(tokenizer: PreTrainedTokenizerBase | None, spec: ModelSpec) -> torch.Tensor:
    if tokenizer is not None:
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)
    draw = torch.Generator().manual_seed(0)
    return torch.randint(spec.vocabulary, (_RANDOM_PROBES,), generator=draw)


def _room(spec: ModelSpec, start: int) -> int:
    """Returns how many tokens fit behind a memory without a change of RoPE's frequencies."""
    ends = [spec.max_position or start + 10**6]
    switches = [layer.rope.switch for layer in spec.layers if layer.rope and layer.rope.switch]
    ends += [switch for switch in switches if start <= switch]
    return min(ends) - start
