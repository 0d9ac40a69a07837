"""``kvedit compose``: several stored memories as one, under a new name."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace

from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import REF, add_put, add_store, newest, open_store, put_options

__all__ = ["COMPOSE"]


def _add(parser: ArgumentParser) -> None:
    parser.add_argument("ref", nargs="+", help=f"{REF}; at least two, all of one model")
    parser.add_argument(
        "--as", dest="name", required=True, metavar="NAME", help="name of the result"
    )
    parser.add_argument(
        "--order",
        type=_numbers,
        metavar="N,N",
        help="which of them stands first, second, …, as numbers from 0; default: as given",
    )
    parser.add_argument(
        "--no-rotate",
        dest="rotate",
        action="store_false",
        help="leave every memory at its own positions, one over the other, as PEFT does",
    )
    add_store(parser)
    add_put(parser)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 1,0, found {text}") from None


def _run(args: Namespace) -> Outcome:
    from kvedit.cartridges import compose
    from kvedit.errors import InvalidArgument
    from kvedit.store.refs import check_name

    if len(args.ref) < 2:
        raise InvalidArgument(f"expected two memories or more to compose, found {args.ref[0]}")
    name = check_name(args.name)
    args.message = args.message or f"compose {' '.join(args.ref)}"
    options = put_options(args)
    store = open_store(args)
    expect = None if args.force else newest(store, name)
    origins = [store.show(ref).record for ref in args.ref]
    parts = [store.get(origin.record) for origin in origins]
    memory = compose(parts, rotate=args.rotate, order=args.order)
    record = store.put(memory, name, expect=expect, **options)
    order = args.order or tuple(range(len(parts)))
    data = {
        **vars(record),
        "parts": [
            {"name": o.name, "version": o.version, "record": o.record, "slots": part.slots}
            for o, part in ((origins[place], parts[place]) for place in order)
        ],
        "slots": memory.slots,
        "next_position": memory.next_position,
        "rotate": args.rotate,
    }
    joined = " + ".join(f"{part['name']} ({part['slots']} slots)" for part in data["parts"])
    how = "" if args.rotate else ", each at its own positions"
    return Outcome(data, f"{record}\n{joined}: {memory.slots} slots{how}")


COMPOSE = Verb(
    "compose",
    "join stored memories into one, behind each other",
    _add,
    _run,
    "kvedit compose handbook-64 ferry-64 --as both",
)
