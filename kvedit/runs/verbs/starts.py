"""``--start NAME KEY=VALUE``: where a training begins, as words of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.runs.verbs.options import note
from kvedit.runs.verbs.parameters import build_editor, parse_value

if TYPE_CHECKING:
    from kvedit.memory import KVMemory
    from kvedit.runs.steps import Loaded
    from kvedit.store import Store

__all__ = ["ChosenStart"]

_EDITOR = "editor"
_TEXTS = ("ref", "text", "prompt")
"""Parameters of starts that stay text where they look like a number."""


@dataclass(frozen=True)
class ChosenStart:
    """A start that was checked, before a model is there.

    Args:
        name: name of the start, or of the editor.
        section: as a config's ``start`` section.
        editor: the editor, for a start that is what an editor leaves.
    """

    name: str
    section: Mapping[str, Any]
    editor: Any

    @classmethod
    def of(cls, words: Sequence[str]) -> ChosenStart:
        """Returns the start of ``NAME key=value …``; NAME may be any editor's.

        Raises:
            UnknownName: if neither a start nor an editor has that name, or a key does not exist.
            InvalidArgument: if a word is no ``key=value``, or a value can't be used.
        """
        from kvedit.editors import REGISTRY
        from kvedit.runs.starting import STARTS, check_start

        name, *pairs = words
        if name in STARTS and name != _EDITOR:
            section = {"start": name, **_parameters(name, pairs)}
            check_start(section)
            return cls(name, section, None)
        if name not in REGISTRY:
            raise UnknownName("start", name, {*STARTS, *REGISTRY} - {_EDITOR})
        return cls(name, {"start": _EDITOR}, build_editor(words))

    def to_json(self) -> dict[str, Any]:
        """Returns the start as plain data, with its editor's name and parameters."""
        if self.editor is None:
            return dict(self.section)
        return {**self.section, "editor": self.name, **self.editor.parameters()}

    def make(self, loaded: Loaded, full: KVMemory, store: Store) -> KVMemory:
        """Returns the memory to start from.

        Args:
            loaded: the model.
            full: the memory that the cartridge shall stand for.
            store: has operands of editors, and stored starts.
        """
        from kvedit.runs.operands import supply
        from kvedit.runs.starting import Around, start

        def supplied(editor: Any) -> list[KVMemory]:
            return supply(editor, store, loaded.model, loaded.tokenizer, note)

        return start(Around(loaded, full, self.editor, supplied, store.get), self.section)


def _parameters(name: str, pairs: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key in ("", "start") or key in found:
            raise InvalidArgument(f"--start {name}: expected each key=value once, found {pair!r}")
        found[key] = text if key in _TEXTS else parse_value(text)
    return found
