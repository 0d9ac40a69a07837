"""``ancestors`` and ``descendants``: what a memory was made of, and what was made of it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import REF, add_store, open_store

if TYPE_CHECKING:
    from kvedit.store import Record

__all__ = ["ANCESTORS", "DESCENDANTS"]


def _add_ancestors(parser: ArgumentParser) -> None:
    parser.add_argument("ref", help=REF)
    add_store(parser)


def _ancestors(args: Namespace) -> Outcome:
    return _listed(open_store(args).ancestors(args.ref), f"nothing stored that {args.ref} is of")


def _add_descendants(parser: ArgumentParser) -> None:
    parser.add_argument("ref", metavar="REF|SOURCE", help=f"{REF}; or a source that was noted")
    add_store(parser)


def _descendants(args: Namespace) -> Outcome:
    return _listed(open_store(args).descendants(args.ref), f"nothing stored was made of {args.ref}")


def _listed(records: Sequence[Record], nothing: str) -> Outcome:
    return Outcome(records, "\n".join(map(str, records)) or nothing)


ANCESTORS = Verb(
    "ancestors",
    "the stored memories that a memory was made of",
    _add_ancestors,
    _ancestors,
    "kvedit ancestors handbook",
)
DESCENDANTS = Verb(
    "descendants",
    "everything stored that was made of a memory, or of a source",
    _add_descendants,
    _descendants,
    "kvedit descendants https://example.org/handbook",
)
