"""Cartridges: memories that are trained to stand for a corpus."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "Batch": "packing",
    "Drift": "trainable",
    "Freeze": "freezing",
    "Objective": "objective",
    "PackedModel": "packed_model",
    "Prefix": "prefix",
    "Sample": "sample",
    "TrainPlan": "plan",
    "TrainableKV": "trainable",
    "TrainableMemory": "trainable",
    "collate": "packing",
    "compose": "composing",
    "open_packed": "packed_model",
    "orders": "composing",
    "sink_positions": "composing",
    "train": "training",
}
_MODULES = ("initial", "study")

__all__ = [*sorted(_LAZY), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"kvedit.cartridges.{_LAZY[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"kvedit.cartridges.{name}")
    raise AttributeError(f"module 'kvedit.cartridges' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
