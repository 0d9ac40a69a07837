"""``gc``, ``fsck``, ``du``, ``stats``: what looks after the files of a store."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import add_store, open_store

__all__ = ["DU", "FSCK", "GC", "STATS"]


def _add_gc(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--waste",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="share of a pack that may be garbage before the rest is packed anew; default: 0.25",
    )
    add_store(parser)


def _gc(args: Namespace) -> Outcome:
    found = open_store(args).gc(args.waste)
    return Outcome(found, str(found))


def _add_fsck(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--repair", action="store_true", help="put what is damaged aside and bring back what can be"
    )
    parser.add_argument(
        "--from",
        dest="sources",
        metavar="PLACE",
        action="append",
        default=[],
        help="another store that may hold the same memories; repeatable",
    )
    add_store(parser)


def _fsck(args: Namespace) -> Outcome:
    from kvedit.store.urls import is_url

    for place in args.sources:
        if not is_url(place) and not Path(place).is_dir():
            raise InvalidArgument(f"--from {place}: there is no such folder")
    sources = [open_store(args, place) for place in args.sources]
    health = open_store(args).fsck(args.repair, sources)
    return Outcome({"ok": health.ok, **asdict(health)}, str(health), code=0 if health.ok else 1)


def _du(args: Namespace) -> Outcome:
    usage = open_store(args).du()
    return Outcome(usage, str(usage))


def _stats(args: Namespace) -> Outcome:
    stats = open_store(args).stats()
    return Outcome(stats.to_json(), repr(stats))


GC = Verb(
    "gc",
    "remove the bytes that no name can reach, and versions whose time is over",
    _add_gc,
    _gc,
    "kvedit gc --waste 0.1",
)
FSCK = Verb(
    "fsck",
    "read a whole store, say what is damaged, repair it; exit status 1 where something stays so",
    _add_fsck,
    _fsck,
    "kvedit fsck --repair --from backup",
)
DU = Verb("du", "which bytes of a store belong to which name", add_store, _du, "kvedit du")
STATS = Verb("stats", "what a store and its tiers hold", add_store, _stats, "kvedit stats")
