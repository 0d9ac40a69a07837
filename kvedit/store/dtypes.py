"""Dtypes that a stored block can have, by the name that digests and manifests use."""

from __future__ import annotations

import torch

from kvedit.errors import InvalidArgument

__all__ = ["CODES", "DTYPES", "NAMES", "dtype_code", "dtype_name"]

CODES = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    "complex64": "C64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "uint8": "U8",
}
"""Name of a dtype to its code in safetensors."""

NAMES = {code: name for name, code in CODES.items()}
"""Code in safetensors to the name of the dtype."""

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in CODES}
"""Name to dtype."""


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype as digests and manifests spell it."""
    return str(dtype).removeprefix("torch.")


def dtype_code(name: str) -> str:
    """Returns the code of a dtype in safetensors.

    Raises:
        InvalidArgument: if the format has none.
    """
    if name not in CODES:
        raise InvalidArgument(f"can't store {name}; known: {', '.join(CODES)}")
    return CODES[name]
