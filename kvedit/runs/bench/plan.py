"""Plan: what a benchmark runs."""

from __future__ import annotations

from dataclasses import dataclass

from kvedit.errors import ContextTooLong, InvalidArgument

__all__ = ["LONG", "PROMPT", "PROMPT_ROOM", "Plan"]

PROMPT = " In short, the answer is"
"""What follows the context where a first token is asked for."""

PROMPT_ROOM = 64
"""Positions kept free for the prompt, whatever the tokenizer."""

LONG = 2048
"""Tokens above which a prefill takes so long that fewer pairs must do."""


@dataclass(frozen=True)
class Plan:
    """What a benchmark runs.

    Args:
        model: as for ``--model``.
        lengths: tokens of context.
        pairs: pairs of times per ratio.
        long_pairs: pairs where a side is a prefill of more than ``LONG`` tokens.
        decode: tokens that are decoded per time.
        threads: of torch.
        dtype: compute dtype; None keeps the checkpoint's.
        device: where the model runs; None is the CPU.

    Raises:
        InvalidArgument: if a number is below one.
    """

    model: str = "smollm2-135m"
    lengths: tuple[int, ...] = (256, 1024, 4096)
    pairs: int = 5
    long_pairs: int = 3
    decode: int = 32
    threads: int = 1
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("pairs", "long_pairs", "decode", "threads"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} must be at least 1, found {getattr(self, name)}")
        if not self.lengths or min(self.lengths) < 1:
            raise InvalidArgument(f"lengths must be at least 1 token, found {self.lengths}")

    def prefill_pairs(self, tokens: int) -> int:
        """Pairs for ratios of prefills of that many tokens."""
        return self.long_pairs if tokens > LONG else self.pairs

    def check_room(self, limit: int | None) -> None:
        """Raises ContextTooLong if context, prompt and decoded tokens pass ``limit`` positions."""
        needed = max(self.lengths) + PROMPT_ROOM + self.decode
        if limit is not None and needed > limit:
            raise ContextTooLong(
                f"{self.model} has {limit} positions; a context of {max(self.lengths)} tokens, its "
                f"prompt and {self.decode} decoded tokens need {needed}: choose shorter --lengths"
            )
