"""Operands and readers for tests: an editor of any kind, applied to a memory of a tiny model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from kvedit.errors import UnknownName

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvedit.memory import KVMemory

__all__ = ["OPERAND_MAKERS", "apply_editor", "make_test_operand"]

OPERAND_MAKERS: Mapping[str, str] = {
    "delta": "kvedit.testing.steering:make_delta",
    "experts": "kvedit.testing.seka:make_experts",
    "projectors": "kvedit.testing.seka:make_projectors",
    "queries": "kvedit.testing.compiling:make_queries",
}
"""Kind of operand to ``"module:function"``, called with model and tokenizer; quick ones, for tiny
models. A kind that an editor asks for needs a line here before the editor has a row."""

_made: WeakKeyDictionary[Any, dict[str, KVMemory]] = WeakKeyDictionary()


def make_test_operand(
    kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> KVMemory:
    """Returns the operand of a kind for a model, made once per model.

    Raises:
        UnknownName: if no maker is registered for the kind.
    """
    kept = _made.setdefault(model, {})
    if kind not in kept:
        if kind not in OPERAND_MAKERS:
            raise UnknownName("kind of operand", kind, OPERAND_MAKERS)
        module, _, function = OPERAND_MAKERS[kind].partition(":")
        kept[kind] = getattr(importlib.import_module(module), function)(model, tokenizer)
    return kept[kind]


def apply_editor(
    editor: Any, memory: KVMemory, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> KVMemory:
    """Returns ``editor(memory)``, with the operands and the reader that it asks for."""
    from kvedit.runtime import ModelReader

    operands = [make_test_operand(kind, model, tokenizer) for kind in editor.operands]
    reads = editor.reproducibility == "reader"
    reader = ModelReader(model, tokenizer) if reads else None
    edited: KVMemory = editor(memory, *operands, reader=reader)
    return edited
