"""Kinds: held-out prompts that shall meet a condition, or shall not, and what steering does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvedit.evals.steering import Asker, Markers
from kvedit.evals.steering.entering import Entry
from kvedit.runs.condition import met, similarities
from kvedit.steering.conditions import Condition

__all__ = ["Kind", "ask_kind", "f1", "kinds_table"]

_NAMES = ("shall meet it", "shall not")


@dataclass(frozen=True)
class Kind:
    """Held-out prompts of one kind, and what steering does to their answers.

    Args:
        prompts: the prompts.
        met: whether each meets the condition.
        marked: how many answers are in the style: unsteered, steered, steered if met.
        changed: how many answers differ from the unsteered ones: steered, steered if met.
    """

    prompts: tuple[str, ...]
    met: tuple[bool, ...]
    marked: tuple[int, ...]
    changed: tuple[int, ...]

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    @property
    def fired(self) -> int:
        """How many meet the condition."""
        return sum(self.met)


def ask_kind(
    asker: Asker,
    condition: Condition,
    entries: Sequence[Entry],
    prompts: Sequence[str],
    markers: Markers,
) -> Kind:
    """Returns prompts of one kind, asked under each way to steer.

    Args:
        asker: how they are asked.
        condition: what decides.
        entries: unsteered, steered, steered if met.
        prompts: the prompts.
        markers: what tells the style.
    """
    places = asker.places(prompts)
    found = [met(condition, one) for one in similarities(asker, condition, places)]
    said = []
    for entry in entries:
        with entry.on() as change:
            said.append([reply.text for reply in asker.reply(places, change)])
    changed = [sum(a != b for a, b in zip(said[0], each, strict=True)) for each in said[1:]]
    marked = [sum(map(markers.marked, each)) for each in said]
    return Kind(tuple(prompts), tuple(found), tuple(marked), tuple(changed))


def f1(wanted: Kind, others: Kind) -> float:
    """Returns the harmonic mean of precision and recall of a condition on held-out prompts."""
    total = wanted.fired + others.fired + wanted.n
    return 2 * wanted.fired / total if total else 0.0


def kinds_table(kinds: Sequence[Kind], steered: Sequence[str]) -> list[list[str]]:
    """Returns a table of both kinds, its first row the header.

    Args:
        kinds: prompts that shall meet it, and those that shall not.
        steered: names of the ways to steer.
    """
    header = ["prompts", "n", "met", "marked", *(f"marked, {name}" for name in steered)]
    rows = [[*header, *(f"changed, {name}" for name in steered)]]
    for name, kind in zip(_NAMES, kinds, strict=True):
        rows.append([name, *map(str, (kind.n, kind.fired, *kind.marked, *kind.changed))])
    return rows
