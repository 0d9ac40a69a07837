"""``ls``, ``show``, ``log`` and ``rm``: what a store holds. None of them needs a model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvedit.runs.verbs.base import Outcome, Verb, table
from kvedit.runs.verbs.options import REF, add_store, open_store, positive

if TYPE_CHECKING:
    from kvedit.store import Entry, Record, Store

__all__ = ["LOG", "LS", "RM", "SHOW"]

_HEADER = ("record", "created", "slots", "size", "model", "codec", "tags", "metrics", "message")
_LONG = ("source", "licence", "expires", "signed by")


def _add_ls(parser: ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", help="names to show, for example 'handbook/*'")
    parser.add_argument("--tag", help="only memories with this tag")
    parser.add_argument(
        "--where",
        metavar="EXPR",
        help='only those that fulfil a condition, for example "tag = refunds and age < 7d"',
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="how many at most")
    parser.add_argument(
        "--after", metavar="NAME", default="", help="only names behind this one: the next page"
    )
    parser.add_argument("--long", action="store_true", help="also source, licence, expiry, signer")
    add_store(parser)


def _ls(args: Namespace) -> Outcome:
    entries = _entries(open_store(args), args)
    if not entries:
        asked = " that fits" if args.pattern or args.tag or args.where or args.after else ""
        return Outcome([], f"{args.store} holds nothing{asked}")
    header = ("name", "versions", "kept", *_HEADER, *(_LONG if args.long else ()))
    rows = [(e.name, e.versions, _kept(e), *_columns(e), *_more(e, args.long)) for e in entries]
    return Outcome(entries, table(header, rows))


def _entries(store: Store, args: Namespace) -> list[Entry]:
    from kvedit.store.where import parse_where

    tag = None if args.tag is None else "tag = '{}'".format(args.tag.replace("'", "''"))
    asked = [text for text in (args.pattern, args.where, tag) if text is not None]
    if len(asked) < 2:
        return store.ls(asked[0] if asked else None, args.limit, args.after)
    conditions = [parse_where(text) for text in asked]
    return store.ls(lambda e: all(c.matches(e) for c in conditions), args.limit, args.after)


def _kept(entry: Entry) -> str:
    return ",".join(word for word in ("pinned", "fixed") if getattr(entry, word))


def _columns(record: Record) -> tuple[Any, ...]:
    from kvedit.memory.show import human_bytes

    return (
        record.record[:12],
        f"{record.created:%Y-%m-%d %H:%M}",
        record.slots,
        human_bytes(record.bytes),
        record.model,
        "" if record.codec == "raw" else record.codec,
        ",".join(record.tags),
        ",".join(f"{name}={value:.4g}" for name, value in record.metrics.items()),
        record.message,
    )


def _more(record: Record, wanted: bool) -> tuple[str, ...]:
    if not wanted:
        return ()
    expires = f"{record.expires:%Y-%m-%d %H:%M}" if record.expires else ""
    return record.source, record.licence, expires, record.signed_by[:12]


def _add_show(parser: ArgumentParser) -> None:
    parser.add_argument("ref", help=REF)
    add_store(parser)


def _show(args: Namespace) -> Outcome:
    details = open_store(args).show(args.ref)
    labels = zip(_LONG, _more(details.record, True), strict=True)
    lines = [str(details), *(f"  {label}: {text}" for label, text in labels if text)]
    return Outcome(details, "\n".join(lines))


def _add_log(parser: ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("--lineage", action="store_true", help="also the steps of every version")
    add_store(parser)


def _log(args: Namespace) -> Outcome:
    store = open_store(args)
    records: Sequence[Record] = store.log(args.name)
    refs = [f"{args.name}@{{{back}}}" for back in range(len(records))]
    rows = [(ref, *_columns(record)) for ref, record in zip(refs, records, strict=True)]
    shown = table(("ref", *_HEADER), rows)
    if not args.lineage:
        return Outcome(records, shown)
    header, *lines = shown.splitlines()
    text, data = [header], []
    for record, line in zip(records, lines, strict=True):
        steps = store.lineage(record.record).describe().splitlines()
        text += [line, *(f"    {step}" for step in steps)]
        data.append({**vars(record), "lineage": steps})
    return Outcome(data, "\n".join(text))


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


LS = Verb(
    "ls",
    "list the memories of a store",
    _add_ls,
    _ls,
    "kvedit ls 'handbook/*' --where 'metric.recall >= 0.9 and age < 7d' --limit 20",
)
SHOW = Verb(
    "show", "what a memory is and how it was made", _add_show, _show, "kvedit show handbook@{1}"
)
LOG = Verb(
    "log", "the versions of a name, newest first", _add_log, _log, "kvedit log handbook --lineage"
)
RM = Verb("rm", "remove names with all their versions", _add_rm, _rm, "kvedit rm handbook")
