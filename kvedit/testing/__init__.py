"""For tests, here and in other packages: tiny models, the oracle, the editor matrix, tolerances."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "CONTEXT": "kvedit.testing.editor_cases",
    "CONTINUATION": "kvedit.testing.editor_cases",
    "EDITOR_CASES": "kvedit.testing.editor_cases",
    "EDITOR_FAMILIES": "kvedit.testing.editor_cases",
    "EditorCase": "kvedit.testing.editor_cases",
    "OPERAND_MAKERS": "kvedit.testing.operands",
    "apply_editor": "kvedit.testing.operands",
    "closed_form_bias": "kvedit.testing.oracle",
    "family_names": "kvedit.models.tiny",
    "make_test_operand": "kvedit.testing.operands",
    "recompute": "kvedit.testing.oracle",
    "refused_model": "kvedit.models.tiny",
    "tiny_model": "kvedit.models.tiny",
}

__all__ = [*sorted(_LAZY), "tolerances"]


def __getattr__(name: str) -> Any:
    if name == "tolerances":
        return importlib.import_module("kvedit.testing.tolerances")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvedit.testing' has no attribute {name!r}")
