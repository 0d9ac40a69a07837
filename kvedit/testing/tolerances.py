"""Named tolerances. A test that needs another one says why, or the number gets a name here."""

from __future__ import annotations

from typing import Final

__all__ = [
    "BF16_BIAS",
    "BF16_LOGITS",
    "FP32_BIAS",
    "FP32_LOGITS",
    "FP32_ORACLE",
    "FP64_ORACLE",
    "SHIFT_KEYS",
    "VISIBLE_EFFECT",
]

FP32_LOGITS: Final = 1e-4
"""Absolute, on logits: capture, attach and continue against one full prefill. Products are summed
in another order when tokens come in pieces; a layer that is off by one slot differs by 1e-1."""

FP32_ORACLE: Final = 1e-5
"""Relative to the largest logit: an edited memory against the recomputation, in float32."""

FP64_ORACLE: Final = 1e-5
"""Absolute, on logits in float64. Norms, rotations and eager softmax stay in float32 in most
families, so no more digits are left than that."""

FP32_BIAS: Final = 1e-6
"""Absolute, on attention weights in [0, 1]: a runtime bias against e**bias and renormalising."""

BF16_LOGITS: Final = 0.25
"""Absolute, on logits of the tiny models (about 8): bfloat16 keeps 8 bits, so one rounding of a
logit is 0.03, and the layers before it add theirs."""

BF16_BIAS: Final = 1e-2
"""Absolute, on attention weights in [0, 1]: the bias is rounded to 8 bits where it joins logits."""

SHIFT_KEYS: Final = 1e-4
"""Relative to the largest key, for positions below 1000: float32 angles of the model err by
1000 * 2**-24 = 6e-5 radians, ours are float64."""

VISIBLE_EFFECT: Final = 1e-3
"""Absolute, on logits: an edit that should act must change them by more than this, or the test
compared nothing. A hundred times FP64_ORACLE."""
