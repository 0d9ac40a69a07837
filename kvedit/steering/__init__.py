"""Steering: contrast sets, deltas found from them, and their use while a model runs."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "Condition": "conditions",
    "Contrast": "contrast",
    "Estimator": "estimators",
    "Last": "scopes",
    "Pair": "contrast",
    "Positions": "scopes",
    "Question": "questions",
    "Readings": "readings",
    "arithmetic_questions": "questions",
    "compile_residual": "compiling",
    "delta_of": "extracting",
    "extract": "extracting",
    "extract_clusters": "extracting",
    "extraction_report": "report",
    "few_shot_reasoning": "templates",
    "find_condition": "searching",
    "go_on": "prompting",
    "persona": "templates",
    "prompted": "prompting",
    "prune_heads": "report",
    "read_contrast": "reading",
    "refusal": "templates",
    "steered": "continuous",
    "style_pairs": "templates",
    "transfer_report": "transferring",
}
_MODULES = ("estimators", "templates")

__all__ = [*sorted(_LAZY), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"kvedit.steering.{_LAZY[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"kvedit.steering.{name}")
    raise AttributeError(f"module 'kvedit.steering' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
