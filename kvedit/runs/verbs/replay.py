"""``kvedit replay``: make a stored memory again from its steps, and compare the two."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvedit.errors import NotFound
from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import REF, add_model, add_store, load_model_of, open_store

if TYPE_CHECKING:
    from kvedit.memory import KVMemory
    from kvedit.store import Store

__all__ = ["REPLAY"]


def _add(parser: ArgumentParser) -> None:
    parser.add_argument("ref", help=REF)
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="repeat all steps, with the model; default: those since the nearest stored memories",
    )
    add_store(parser)
    add_model(parser, default="the one that made the memory, with --from-scratch; otherwise none")


def _run(args: Namespace) -> Outcome:
    from kvedit.editors.replaying import compare_replay, replay

    store = open_store(args)
    record = store.show(args.ref).record
    memory = store.get(record.record)
    lookup = None if args.from_scratch else _lookup(store)
    runs = args.model or args.from_scratch
    try:
        again = replay(memory, lookup, **(_means(memory, args) if runs else {}))
    except NotFound as error:
        if runs:
            raise
        raise NotFound(f"{error} (on the command line: --model NAME or --from-scratch)") from error
    report = compare_replay(memory, again)
    return Outcome({"name": record.name, "record": record.record, **vars(report)}, repr(report))


def _lookup(store: Store) -> Callable[[str], KVMemory | None]:
    def find(name: str) -> KVMemory | None:
        found = store.memory_of(name)
        if found is None and name in store:  # a memory without history, by its content
            found = store.get(name)
        return found

    return find


def _means(memory: KVMemory, args: Namespace) -> dict[str, Any]:
    """Returns what a replay needs to run the model."""
    args.dtype = args.dtype or _recorded_dtype(memory)
    model, tokenizer = load_model_of(memory, args)
    from kvedit.runtime import ModelReader, recapturer

    found: dict[str, Any] = {"reader": ModelReader(model, tokenizer)}
    if memory.source is not None:
        found["capture"] = recapturer(model, tokenizer, memory.source)
    return found


def _recorded_dtype(memory: KVMemory) -> str:
    """Returns the dtype in which the model ran; a memory may have been cast since."""
    for node in memory.lineage.nodes:
        if node.operation in ("capture", "grow"):
            return dict(node.environment).get("dtype", str(memory.dtype))
    return str(memory.dtype)


REPLAY = Verb(
    "replay",
    "make a memory again from its steps and say whether it is the same, bit by bit",
    _add,
    _run,
    "kvedit replay handbook --from-scratch",
)
