"""drawer: random numbers that depend on a seed, a purpose and a number, and on nothing else.

A sample's draws don't depend on what was drawn before it, so a run that is cut and resumed, or
done in other batches, draws the same.
"""

from __future__ import annotations

import random

from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["drawer", "sub_seed"]


def sub_seed(seed: int, purpose: str, number: int) -> int:
    """Returns a seed of 62 bits for one purpose and one number."""
    return int(digest_bytes(canonical_json([seed, purpose, number]))[:16], 16) >> 2


def drawer(seed: int, purpose: str, number: int) -> random.Random:
    """Returns a source of random numbers for one purpose and one number."""
    return random.Random(sub_seed(seed, purpose, number))
