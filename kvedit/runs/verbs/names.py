"""``tag``, ``branch``, ``rollback``, ``annotate``, ``pin``, ``unpin``: what is done to names."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import REF, add_store, duration, open_store

__all__ = ["ANNOTATE", "BRANCH", "PIN", "ROLLBACK", "TAG", "UNPIN"]

_DIGEST = 6  # characters that a prefix of a digest has at least


def _add_new_name(parser: ArgumentParser) -> None:
    parser.add_argument("ref", help=REF)
    parser.add_argument("name", help="the new name")
    parser.add_argument("--message", metavar="TEXT", default="", help="what to say about it")
    add_store(parser)


def _tag(args: Namespace) -> Outcome:
    record = open_store(args).tag(args.ref, args.name, args.message)
    return Outcome(record, str(record))


def _branch(args: Namespace) -> Outcome:
    record = open_store(args).branch(args.ref, args.name, args.message)
    return Outcome(record, str(record))


def _add_rollback(parser: ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument(
        "--to",
        type=_version,
        metavar="K|DIGEST",
        default=1,
        help="versions back, or the digest of a version of this name; default: 1",
    )
    parser.add_argument("--message", metavar="TEXT", default="", help="what to say about it")
    add_store(parser)


def _version(text: str) -> str | int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < _DIGEST else text


def _rollback(args: Namespace) -> Outcome:
    record = open_store(args).rollback(args.name, args.to, args.message)
    return Outcome(record, str(record))


def _add_annotate(parser: ArgumentParser) -> None:
    parser.add_argument("ref", help="name or name@{1}")
    parser.add_argument("--message", metavar="TEXT", help="what to say about it")
    tags = parser.add_mutually_exclusive_group()
    tags.add_argument("--tag", action="append", help="all of its labels; may be repeated")
    tags.add_argument("--no-tags", action="store_true", help="take its labels away")
    parser.add_argument("--source", metavar="TEXT", help="where the text came from")
    parser.add_argument("--licence", metavar="TEXT", help="of the text")
    parser.add_argument(
        "--metric",
        type=_metric,
        action="append",
        metavar="NAME=VALUE",
        help="a result to add or replace; may be repeated",
    )
    parser.add_argument(
        "--ttl", type=duration, metavar="TIME", help="from now: 30m, 12h, 7d; 0 takes it away"
    )
    add_store(parser)


def _metric(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        if equals and name:
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected NAME=VALUE like recall=0.93, found {text}")


def _annotate(args: Namespace) -> Outcome:
    labels: dict[str, Any] = {
        "message": args.message,
        "tags": [] if args.no_tags else args.tag,
        "source": args.source,
        "licence": args.licence,
        "metrics": dict(args.metric) if args.metric else None,
        "ttl": args.ttl,
    }
    if all(value is None for value in labels.values()):
        raise InvalidArgument("nothing to note: give --message, --tag, --metric, …")
    record = open_store(args).annotate(args.ref, **labels)
    return Outcome(record, str(record))


def _add_pin(parser: ArgumentParser) -> None:
    parser.add_argument("name")
    add_store(parser)


def _pin(args: Namespace) -> Outcome:
    open_store(args).pin(args.name)
    return Outcome({"name": args.name, "pinned": True}, f"pinned {args.name}")


def _unpin(args: Namespace) -> Outcome:
    open_store(args).unpin(args.name)
    return Outcome({"name": args.name, "pinned": False}, f"unpinned {args.name}")


TAG = Verb(
    "tag",
    "give a memory a new name that does not move",
    _add_new_name,
    _tag,
    "kvedit tag handbook@{1} releases/june",
)
BRANCH = Verb(
    "branch",
    "begin a new name with a memory that is stored",
    _add_new_name,
    _branch,
    "kvedit branch handbook trials/stronger",
)
ROLLBACK = Verb(
    "rollback",
    "make an earlier version of a name its newest again",
    _add_rollback,
    _rollback,
    "kvedit rollback handbook --to 2",
)
ANNOTATE = Verb(
    "annotate",
    "change what is noted beside a version",
    _add_annotate,
    _annotate,
    "kvedit annotate handbook --metric recall=0.93 --tag checked",
)
PIN = Verb("pin", "keep a name out of eviction and expiry", _add_pin, _pin, "kvedit pin handbook")
UNPIN = Verb("unpin", "take the pin of a name away", _add_pin, _unpin, "kvedit unpin handbook")
