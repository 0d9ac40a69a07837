"""``kvedit replay``: make a stored memory again from its steps, and say how far it is."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import REF, add_model, add_store, load_model_of, open_store

__all__ = ["REPLAY"]


def _add(parser: ArgumentParser) -> None:
    parser.add_argument("ref", help=REF)
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="repeat the capture as well, with the model, instead of starting at a stored memory",
    )
    add_store(parser)
    add_model(parser, "the one that the memory names")


def _run(args: Namespace) -> Outcome:
    from kvedit.editors.replaying import compare_replay, replay

    store = open_store(args)
    memory = store.get(args.ref)
    capture: Any = None
    if args.from_scratch and memory.source is not None:
        from kvedit.runtime.recapture import recapturer

        capture = recapturer(*load_model_of(memory, args), memory.source)
    inputs: Any = {} if args.from_scratch else store.memory_of
    report = compare_replay(memory, replay(memory, inputs, capture))
    return Outcome(report, str(report))


REPLAY = Verb(
    "replay",
    "make a memory again from its steps, and compare",
    _add,
    _run,
    "kvedit replay handbook --from-scratch",
)
