"""``ls``, ``show``, ``log`` and ``rm``: what a store holds. None of them needs a model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvedit.runs.verbs.base import Outcome, Verb, table
from kvedit.runs.verbs.options import add_store, open_store, positive, quoted

if TYPE_CHECKING:
    from kvedit.store import Record

__all__ = ["LOG", "LS", "RM", "SHOW"]


def _add_ls(parser: ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", help="names to show, for example 'handbook/*'")
    parser.add_argument("--tag", help="only memories with this tag")
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="for example 'tag = refunds and metric.kl < 0.01 and age < 7d'",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="how many at most")
    parser.add_argument("--after", metavar="NAME", default="", help="only names behind this one")
    add_store(parser)


def _ls(args: Namespace) -> Outcome:
    store = open_store(args)
    asked_for = [f"({args.where})"] if args.where else []
    asked_for += [f"name ~ {quoted(args.pattern)}"] if args.pattern else []
    asked_for += [f"tag = {quoted(args.tag)}"] if args.tag is not None else []
    entries = store.ls(" and ".join(asked_for) or None, args.limit, args.after)
    if not entries:
        asked = " that fits" if asked_for or args.after else ""
        return Outcome([], f"{store.path} holds nothing{asked}")
    header = ("name", "versions", "record", "created", "slots", "size", "model", "tags", "message")
    rows = [(e.name, e.versions, *_columns(e)) for e in entries]
    return Outcome(entries, table(header, rows))


def _columns(record: Record) -> tuple[Any, ...]:
    from kvedit.memory.show import human_bytes

    return (
        record.record[:12],
        f"{record.created:%Y-%m-%d %H:%M}",
        record.slots,
        human_bytes(record.bytes),
        record.model,
        ",".join(record.tags),
        record.message,
    )


def _add_show(parser: ArgumentParser) -> None:
    parser.add_argument("ref", help="name, name@{1}, digest or the beginning of one")
    add_store(parser)


def _show(args: Namespace) -> Outcome:
    details = open_store(args).show(args.ref)
    return Outcome(details, str(details))


def _add_log(parser: ArgumentParser) -> None:
    parser.add_argument("name")
    add_store(parser)


def _log(args: Namespace) -> Outcome:
    records: Sequence[Record] = open_store(args).log(args.name)
    header = ("ref", "record", "created", "slots", "size", "model", "tags", "message")
    rows = [(f"{args.name}@{{{back}}}", *_columns(r)) for back, r in enumerate(records)]
    return Outcome(records, table(header, rows))


def _add_rm(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="+", help="removed with all its versions")
    add_store(parser)


def _rm(args: Namespace) -> Outcome:
    store = open_store(args)
    # All names are looked up first: a typo in the second leaves the first alone.
    versions = {name: len(store.log(name)) for name in args.name}
    for name in versions:
        store.rm(name)
    removed = [{"name": name, "versions": count} for name, count in versions.items()]
    return Outcome(
        {"removed": removed},
        "\n".join(f"removed {name} ({count} versions)" for name, count in versions.items()),
    )


LS = Verb("ls", "list the memories of a store", _add_ls, _ls, "kvedit ls 'handbook/*'")
SHOW = Verb(
    "show", "what a memory is and how it was made", _add_show, _show, "kvedit show handbook@{1}"
)
LOG = Verb("log", "the versions of a name, newest first", _add_log, _log, "kvedit log handbook")
RM = Verb("rm", "remove names with all their versions", _add_rm, _rm, "kvedit rm handbook")
