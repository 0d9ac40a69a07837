"""``export --to`` and ``import --from`` for steering deltas: written, read back, compared."""

from __future__ import annotations

import warnings
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome
from kvedit.runs.verbs.options import load_model, load_model_of, note, open_store

if TYPE_CHECKING:
    from kvedit.interop.directions import DeltaReadBack
    from kvedit.interop.formats import Format
    from kvedit.memory import KVMemory
    from kvedit.store import Record

__all__ = ["check_no_delta", "export_delta", "import_delta"]


def check_no_delta(record: Record, memory: KVMemory, form: Format) -> None:
    """Raises InvalidArgument if it is a delta, which formats of memories don't hold."""
    from kvedit.interop.formats import FORMATS
    from kvedit.memory.delta import DELTA
    from kvedit.memory.operand import operand_kind

    if operand_kind(memory) != DELTA:
        return
    ways = [one.name for one in FORMATS.values() if one.delta and "to" in one.ways]
    raise InvalidArgument(
        f"{record.name} is a steering delta, and {form.name} holds the memory of a context: "
        f"--to {ways[0]} writes it whole, --to {' or '.join(ways[1:])} for others"
    )


def export_delta(
    args: Namespace, form: Format, record: Record, memory: KVMemory, options: dict[str, Any]
) -> Outcome:
    """Returns what the export of a delta did, after reading it back.

    Args:
        args: the verb's arguments.
        form: the format.
        record: the record of the delta.
        memory: the operand that the store gave.
        options: for the format's export.

    Raises:
        InvalidArgument: if it is no delta, or can't be said in that format.
    """
    from kvedit.interop.directions import check_delta
    from kvedit.memory import Delta

    delta = Delta.of(memory)
    live: tuple[Any, ...] = ()
    if form.needs_model:
        live = load_model_of(memory, args)
        options["strict"] = not args.no_strict
    elif args.model:
        raise InvalidArgument(f"--model: {form.name} is written without a model")
    done = form.write(delta, args.file, *live, **options)
    found = None
    if "from" in form.ways and not args.no_check:
        found = check_delta(delta, form.read(args.file))
    data = {
        "name": record.name,
        "record": record.record,
        "file": args.file,
        "format": done.format,
        "sites": list(delta.sites),
        "layers": list(delta.layers),
        "notes": done.notes,
        "check": _as_data(found),
    }
    lines = [f"{record.name} {record.record[:12]} is in {args.file} ({_size(delta)})"]
    lines += [str(found)] if found else []
    return Outcome(data, "\n".join(lines + [f"note: {one}" for one in done.notes]))


def import_delta(args: Namespace, form: Format, target: str) -> Outcome:
    """Returns what the import of a delta did, after reading it back from the store.

    Args:
        args: the verb's arguments.
        form: the format.
        target: the name to put it under.

    Raises:
        InvalidArgument: if an option does not fit, or a model must be named.
    """
    from kvedit.interop.directions import check_delta
    from kvedit.memory import Delta

    if args.revision:
        raise InvalidArgument("--revision is of a repository on the hub")
    if args.no_strict and form.needs_model:
        raise InvalidArgument(
            f"--no-strict means nothing to {form.name}, whose files name no more than a model type"
        )
    live: tuple[Any, ...] = ()
    if args.model:
        live = load_model(args.model, args.dtype, args.device, args.attn)
    elif form.needs_model:
        raise InvalidArgument(f"{args.file} does not say which model it is for: name it (--model)")
    options = {"strict": False} if args.no_strict else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        delta = form.read(args.file, *live, **options)
    for one in said:
        note(str(one.message))
    store = open_store(args)
    message = f"imported from {form.name}"
    record = store.put(delta.operand(), target, message, force=args.force)
    found = None
    if not args.no_check:
        found = check_delta(delta, Delta.of(store.get(record.record)))
    data = {**vars(record), "format": form.name, "check": _as_data(found)}
    return Outcome(data, "\n".join([str(record), *([str(found)] if found else [])]))


def _size(delta: Any) -> str:
    return f"{', '.join(delta.sites)} of {len(delta.layers)} layers"


def _as_data(found: DeltaReadBack | None) -> dict[str, Any] | None:
    return None if found is None else {**vars(found), "relative": found.relative}
