"""Where positions end: the model's limit, and the length at which some RoPE types change."""

from __future__ import annotations

from kvedit.errors import ContextTooLong
from kvedit.memory import ModelSpec

__all__ = ["check_switch"]


def check_switch(spec: ModelSpec, start: int, stop: int) -> None:
    """Raises if tokens up to position ``stop`` would meet keys that older frequencies rotated.

    Args:
        spec: the model's facts.
        start: position of the first new token; 0 if there are no keys yet.
        stop: one past the last position.

    Raises:
        ContextTooLong: names the RoPE type and the position.
    """
    for layer in spec.layers:
        rope = layer.rope
        if rope is None or rope.switch is None or stop <= rope.switch:
            continue
        if rope.kind == "dynamic":
            raise ContextTooLong(
                f"dynamic NTK RoPE changes its frequencies with every length past {rope.switch}, "
                f"so keys of a context of {stop} positions can't be kept"
            )
        if 0 < start <= rope.switch:
            raise ContextTooLong(
                f"{rope.kind} RoPE changes its frequencies at position {rope.switch}: the "
                f"{start} positions so far were rotated by the short ones, {stop} need the long "
                "ones; capture the whole context in one chunk past that length"
            )
