"""Beside: the ``distractors`` of a config, memories beside which a cartridge is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.runs.material import Material, read_material
from kvedit.runs.targets import fill

__all__ = ["Other", "check_fraction", "read_others"]


@dataclass(frozen=True)
class Other:
    """One distractor: a stored memory, or a text that is captured.

    Args:
        ref: reference of the memory, or None.
        material: the text, or None.
    """

    ref: str | None
    material: Material | None

    def memory(
        self, stored: Callable[[str], KVMemory], captured: Callable[[Material], KVMemory]
    ) -> KVMemory:
        """Returns the memory.

        Args:
            stored: returns the memory of a reference.
            captured: returns the memory of a text.
        """
        if self.material is not None:
            return captured(self.material)
        return stored(str(self.ref))


def read_others(section: Any, fraction: float) -> tuple[Other, ...]:
    """Returns a checked ``distractors`` section; None and an empty list are none.

    Args:
        section: a list; each entry is a reference, or a mapping with ``ref``, or with the keys of
            a document (``path``, ``text``, …).
        fraction: the plan's fraction of steps that have some.

    Raises:
        InvalidArgument: if it is no list, an entry names nothing or two things, or memories
            without steps or steps without memories are asked for.
        UnknownName: if an entry has another key.
    """
    if section is not None and not isinstance(section, list | tuple):
        raise InvalidArgument(
            f"distractors: expected a list such as [{{ref: NAME}}, {{path: FILE}}], found "
            f"{section!r}"
        )
    found = tuple(_other(f"distractors[{i}]", each) for i, each in enumerate(section or ()))
    check_fraction(len(found), fraction)
    return found


def check_fraction(count: int, fraction: float) -> None:
    """Raises InvalidArgument unless there are distractors exactly where a plan wants them."""
    if (count > 0) != (fraction > 0):
        raise InvalidArgument(
            f"train.distractors, the fraction of steps beside other memories, is {fraction} and "
            f"{count} distractors are named: give both (train.distractors=0.5) or neither"
        )


def _other(place: str, given: Any) -> Other:
    entry = {"ref": given} if isinstance(given, str) else given
    if not isinstance(entry, Mapping) or not entry:
        raise InvalidArgument(
            f"{place}: expected the name of a stored memory, or {{ref: NAME}}, or a text such as "
            f"{{path: FILE}}, found {given!r}"
        )
    if "ref" not in entry:
        return Other(None, fill(place, read_material, {"role": "system", **entry}))
    if len(entry) > 1 or not isinstance(entry["ref"], str):
        raise InvalidArgument(
            f"{place}: a stored memory is named by ref alone, found {dict(entry)!r}"
        )
    return Other(entry["ref"], None)
