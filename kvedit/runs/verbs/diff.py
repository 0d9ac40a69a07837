"""``kvedit diff``: where two stored memories differ, by which steps, and to what effect."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome, Verb, table
from kvedit.runs.verbs.options import (
    REF,
    add_model,
    add_prompt,
    add_store,
    load_model_of,
    open_store,
    positive,
)

if TYPE_CHECKING:
    from kvedit.evals import Divergence
    from kvedit.memory import Comparison
    from kvedit.store import Store
    from kvedit.store.diff import MemoryDiff, SlotChange

__all__ = ["DIFF"]

_SLOTS = 10


def _add(parser: ArgumentParser) -> None:
    parser.add_argument("a", help=REF)
    parser.add_argument("b", help="likewise")
    parser.add_argument(
        "--slots",
        type=positive,
        nargs="?",
        const=_SLOTS,
        metavar="N",
        help=f"also the N slots that changed most (default of N: {_SLOTS})",
    )
    parser.add_argument(
        "--probe",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
        help="prompts over which the model's next-token distributions are compared",
    )
    parser.add_argument("--probes", metavar="FILE", help="a text file with one prompt per line")
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="also compare greedy answers"
    )
    add_store(parser)
    add_model(parser, default="the one that made a; only probes need one")
    add_prompt(parser)


def _run(args: Namespace) -> Outcome:
    from kvedit.store.diff import diff_memories

    prompts = [*args.probe, *(_prompts(args.probes) if args.probes else ())]
    if not prompts and (args.model or args.max_new_tokens):
        raise InvalidArgument("--model and --max-new-tokens need prompts: --probe or --probes")
    store = open_store(args)
    found = diff_memories(store, args.a, args.b, slots=args.slots or 0)
    comparison = found.comparison
    data: dict[str, Any] = {
        "a": args.a,
        "b": args.b,
        "identical": comparison.identical,
        "blocks": found.blocks,
        "changed_slots": found.changed,
        "layers": [_row(comparison, index) for index in range(len(comparison.layers))],
        "steps": {"only_a": found.steps_a, "only_b": found.steps_b},
    }
    behaviour = _behaviour(store, found, prompts, args) if prompts else None
    if args.slots:
        data["slots"] = found.slots
    if behaviour is not None:
        data["behaviour"] = behaviour.to_json()
    return Outcome(data, _shown(found, data, args.slots, behaviour))


def _prompts(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"--probes {path} is no UTF-8 text: {error}") from error
    except OSError as error:
        raise InvalidArgument(f"can't read --probes {path}: {error.strerror}") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise InvalidArgument(f"--probes {path} holds no prompt: write one per line")
    return found


def _behaviour(store: Store, found: MemoryDiff, prompts: list[str], args: Namespace) -> Divergence:
    a, b = (store.get(record.record) for record in (found.a, found.b))
    model, tokenizer = load_model_of(a, args)
    from kvedit.evals import divergence

    return divergence(
        model,
        tokenizer,
        a,
        b,
        prompts,
        max_new_tokens=args.max_new_tokens or 0,
        chat=args.chat,
        strict=args.strict,
    )


def _row(found: Comparison, row: int) -> dict[str, Any]:
    return {
        "layer": found.layers[row],
        "keys": float(found.keys[row].max()),
        "values": float(found.values[row].max()),
        "bias": float(found.bias[row].max()),
        "only_a": found.only_a[row],
        "only_b": found.only_b[row],
        "moved": found.moved[row],
    }


def _shown(
    found: MemoryDiff, data: dict[str, Any], slots: int | None, behaviour: Divergence | None
) -> str:
    lines = [str(found.blocks)]
    if found.comparison.identical:
        lines.append("no difference in keys, values, bias and slots")
    else:
        lines.append(_layers(data["layers"]))
    if slots and found.slots:
        lines += [f"{found.changed} slots changed, most:", _slots(found.slots)]
    for side, described in data["steps"].items():
        lines += [f"{side.replace('_', ' in ')}: {step}" for step in described]
    if behaviour is not None:
        lines.append(repr(behaviour))
    return "\n".join(lines)


def _layers(rows: list[dict[str, Any]]) -> str:
    # Largest relative distance over the heads of a layer; bias in nats.
    header = ("layer", "keys", "values", "bias", "only in a", "only in b", "moved")
    numbers, counts = ("keys", "values", "bias"), ("only_a", "only_b", "moved")
    shown = [
        (row["layer"], *(f"{row[name]:.3g}" for name in numbers), *(row[name] for name in counts))
        for row in rows
        if any(row[name] for name in (*numbers, *counts))
    ]
    return table(header, shown)


def _slots(changes: tuple[SlotChange, ...]) -> str:
    header = ("layer", "slot", "token", "‖Δkeys‖", "‖Δvalues‖", "relative", "bias", "text")
    rows = [
        (
            one.layer,
            one.slot_a,
            one.token,
            *(f"{value:.3g}" for value in (one.keys, one.values, one.relative, one.bias)),
            repr(one.text),
        )
        for one in changes
    ]
    return table(header, rows)


DIFF = Verb(
    "diff",
    "where two stored memories differ, layer by layer, and how a model behaves over them",
    _add,
    _run,
    "kvedit diff handbook@{1} handbook --slots 5 --probe 'How long do I have?'",
)
