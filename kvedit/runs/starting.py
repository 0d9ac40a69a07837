"""Starts of a training run by name: what ``start`` in a config may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvedit.cartridges import initial
from kvedit.cartridges.initial.summarised import PROMPT
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.memory import KVMemory
from kvedit.runs.steps import Loaded, edit
from kvedit.runs.targets import check_keys

__all__ = ["STARTS", "Around", "check_start", "start"]


@dataclass(frozen=True, eq=False)
class Around:
    """What a start is made of, besides its own parameters.

    Args:
        loaded: the model.
        full: the memory of the whole corpus.
        editor: what the start ``editor`` edits by, or None.
        operands: returns an editor's operands.
        stored: returns the memory of a reference.
    """

    loaded: Loaded
    full: KVMemory
    editor: Any
    operands: Callable[[Any], Sequence[KVMemory]]
    stored: Callable[[str], KVMemory]


def start(around: Around, section: Mapping[str, Any]) -> KVMemory:
    """Returns the start that a section names; prompts follow it as they follow the corpus."""
    parameters = dict(section)
    return STARTS[parameters.pop("start")](around, **parameters)


def check_start(section: Any) -> None:
    """Raises if a ``start`` section names none, or has keys that it doesn't know.

    Raises:
        InvalidArgument: if it is no section, or lacks a value.
        UnknownName: if there is no such start or key.
    """
    if not isinstance(section, Mapping):
        raise InvalidArgument(f"start: expected keys and values, found {section!r}")
    parameters = dict(section)
    name = parameters.pop("start", "")
    if name not in STARTS:
        raise UnknownName("start", str(name), STARTS)
    check_keys("start", STARTS[name], parameters, given=1)


def _standing(made: KVMemory, around: Around) -> KVMemory:
    found: KVMemory = initial.stand_for(made, around.full)
    return found


def _editor(around: Around) -> KVMemory:
    others = around.operands(around.editor)
    return edit(around.loaded, around.full, around.editor, others)


def _first_tokens(around: Around, slots: float) -> KVMemory:
    loaded = around.loaded
    made: KVMemory = initial.first_tokens(loaded.model, loaded.tokenizer, around.full, slots)
    return made


def _text_tokens(around: Around, slots: int, text: str | None = None) -> KVMemory:
    loaded = around.loaded
    made = initial.text_tokens(loaded.model, loaded.tokenizer, slots, text)
    return _standing(made, around)


def _random_vectors(
    around: Around,
    slots: int,
    seed: int = 0,
    scale: Literal["model", "unit"] = "model",
    sink: bool = True,
) -> KVMemory:
    loaded = around.loaded
    made = initial.random_vectors(
        loaded.model, loaded.tokenizer, slots, seed=seed, scale=scale, sink=sink
    )
    return _standing(made, around)


def _sampled_chunks(around: Around, slots: float, chunk: int = 64, seed: int = 0) -> KVMemory:
    loaded, full = around.loaded, around.full
    made = initial.sampled_chunks(
        loaded.model, loaded.tokenizer, full.tokens, slots, chunk=chunk, seed=seed
    )
    return _standing(made, around)


def _summary(around: Around, slots: int, prompt: str = PROMPT) -> KVMemory:
    loaded = around.loaded
    made = initial.summary(loaded.model, loaded.tokenizer, around.full, slots, prompt=prompt)
    return _standing(made, around)


def _stored(around: Around, ref: str) -> KVMemory:
    found, wanted = around.stored(ref), around.full.source
    same = found.source is not None and wanted is not None and found.source.text == wanted.text
    # A cartridge of this corpus goes on as it is; one of another corpus, or of none, becomes one
    # of this: prompts must follow it as samples do.
    return found if same else _standing(found, around)


STARTS: Mapping[str, Callable[..., KVMemory]] = {
    "editor": _editor,
    "first_tokens": _first_tokens,
    "random_vectors": _random_vectors,
    "sampled_chunks": _sampled_chunks,
    "stored": _stored,
    "summary": _summary,
    "text_tokens": _text_tokens,
}
"""Name of a start to what makes it."""
