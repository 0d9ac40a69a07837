"""``kvedit diff``: where two stored memories differ, and by which steps."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from kvedit.runs.verbs.base import Outcome, Verb, table
from kvedit.runs.verbs.options import add_store, open_store

if TYPE_CHECKING:
    from kvedit.memory import Comparison, KVMemory

__all__ = ["DIFF"]


def _add(parser: ArgumentParser) -> None:
    parser.add_argument("a", help="name, name@{1}, digest or the beginning of one")
    parser.add_argument("b", help="likewise")
    add_store(parser)


def _run(args: Namespace) -> Outcome:
    from kvedit.memory import compare

    store = open_store(args)
    a, b = store.get(args.a), store.get(args.b)
    found = compare(a, b)
    rows = [_row(found, index) for index in range(len(found.layers))]
    steps = {"only_a": _steps(a, b), "only_b": _steps(b, a)}
    data = {"a": args.a, "b": args.b, "identical": found.identical, "layers": rows, "steps": steps}
    return Outcome(data, _shown(found.identical, rows, steps))


def _row(found: Comparison, row: int) -> dict[str, Any]:
    return {
        "layer": found.layers[row],
        "keys": float(found.keys[row].max()),
        "values": float(found.values[row].max()),
        "bias": float(found.bias[row].max()),
        "only_a": found.only_a[row],
        "only_b": found.only_b[row],
    }


def _steps(one: KVMemory, other: KVMemory) -> list[str]:
    shared = {node.id for node in other.lineage.nodes}
    return [node.describe() for node in one.lineage.nodes if node.id not in shared]


def _shown(identical: bool, rows: list[dict[str, Any]], steps: dict[str, list[str]]) -> str:
    lines = []
    if identical:
        lines.append("no difference in keys, values, bias and slots")
    else:
        # Largest relative distance over the heads of a layer; bias in nats.
        header = ("layer", "keys", "values", "bias", "only in a", "only in b")
        numbers = ("keys", "values", "bias")
        shown = [
            (
                row["layer"],
                *(f"{row[name]:.3g}" for name in numbers),
                row["only_a"],
                row["only_b"],
            )
            for row in rows
            if any(row[name] for name in (*numbers, "only_a", "only_b"))
        ]
        lines.append(table(header, shown))
    for side, described in steps.items():
        lines += [f"{side.replace('_', ' in ')}: {step}" for step in described]
    return "\n".join(lines)


DIFF = Verb(
    "diff",
    "where two stored memories differ, layer by layer",
    _add,
    _run,
    "kvedit diff handbook@{1} handbook",
)
