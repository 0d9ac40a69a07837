"""Verbs that name, move and look after stored memories. None of them needs a model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.runs.verbs.base import Outcome, Verb, table
from kvedit.runs.verbs.options import REF, add_store, duration, open_store

if TYPE_CHECKING:
    from kvedit.store import Store

__all__ = ["STORE_VERBS"]

Action = Callable[["Store", Namespace], Any]
Add = Callable[[ArgumentParser], None]


def _verb(name: str, summary: str, action: Action, example: str, *adders: Add) -> Verb:
    def add(parser: ArgumentParser) -> None:
        for one in adders:
            one(parser)
        add_store(parser)

    def run(args: Namespace) -> Outcome:
        with open_store(args) as store:
            found = action(store, args)
        return found if isinstance(found, Outcome) else Outcome(found, str(found))

    return Verb(name, summary, add, run, f"kvedit {name} {example}".rstrip())


def _ref(parser: ArgumentParser) -> None:
    parser.add_argument("ref", help=REF)


def _name(parser: ArgumentParser) -> None:
    parser.add_argument("name")


def _names(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="*", help="which names; none for all")


def _force(parser: ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="also where a name went another way")


def _file(parser: ArgumentParser) -> None:
    parser.add_argument("file", help="of one memory with all it needs")


def _message(parser: ArgumentParser) -> None:
    parser.add_argument("--message", metavar="TEXT", default="")


def _rollback(parser: ArgumentParser) -> None:
    parser.add_argument("--to", default="1", help="versions back, or a digest (default: 1)")


def _labels(parser: ArgumentParser) -> None:
    parser.add_argument("--message", metavar="TEXT")
    parser.add_argument("--tag", action="append", help="all of its tags; repeatable")
    parser.add_argument("--source", metavar="TEXT")
    parser.add_argument("--licence", metavar="TEXT")
    parser.add_argument("--metric", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--ttl", type=duration, metavar="TIME", help="30m, 12h, 7d; 0 for never")


def _annotate(store: Store, args: Namespace) -> Any:
    from kvedit.errors import InvalidArgument

    metrics = {}
    for text in args.metric:
        name, sign, value = text.partition("=")
        try:
            metrics[name] = float(value)
        except ValueError:
            raise InvalidArgument(f"--metric is NAME=VALUE with a number, found {text}") from None
        if not sign:
            raise InvalidArgument(f"--metric is NAME=VALUE with a number, found {text}")
    return store.annotate(
        args.ref,
        message=args.message,
        tags=args.tag,
        source=args.source,
        licence=args.licence,
        metrics=metrics,
        ttl=args.ttl,
    )


def _pin(store: Store, args: Namespace) -> Any:
    store.pin(args.name)
    return Outcome({"pinned": args.name}, f"pinned {args.name}")


def _unpin(store: Store, args: Namespace) -> Any:
    store.unpin(args.name)
    return Outcome({"unpinned": args.name}, f"unpinned {args.name}")


def _waste(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--waste",
        type=float,
        default=0.25,
        help="share of a pack that may be garbage before the rest is packed anew (default: 0.25)",
    )


def _fsck_options(parser: ArgumentParser) -> None:
    parser.add_argument("--repair", action="store_true", help="put damage aside, bring back")
    parser.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        metavar="PLACE",
        help="another store that may have the same memories; repeatable",
    )


def _fsck(store: Store, args: Namespace) -> Any:
    health = store.fsck(args.repair, [open_store(args, place) for place in args.sources])
    return Outcome(health, str(health), 0 if health.ok else 1)


def _stats(store: Store, args: Namespace) -> Any:
    found = store.stats()
    return Outcome(found.to_json(), repr(found))


def _export_options(parser: ArgumentParser) -> None:
    parser.add_argument("--file-key", metavar="FILE", help="a key that encrypts the file")
    parser.add_argument("--plain", action="store_true", help="an encrypted memory in the clear")


def _export(store: Store, args: Namespace) -> Any:
    key = Path(args.file_key) if args.file_key else None
    size = store.export(args.ref, args.file, key=key, plain=args.plain)
    return Outcome({"file": args.file, "bytes": size}, f"wrote {args.file}, {size} bytes")


def _import_options(parser: ArgumentParser) -> None:
    parser.add_argument("--name", help="where to put it; default: the name that it had")
    parser.add_argument("--record", metavar="DIGEST", help="that it must have")
    parser.add_argument("--file-key", metavar="FILE", help="the key that opens the file")


def _import(store: Store, args: Namespace) -> Any:
    key = Path(args.file_key) if args.file_key else None
    return store.import_(args.file, args.name, args.record, key, args.force)


def _push(store: Store, args: Namespace) -> Any:
    sent = store.push(args.name or None, args.force)
    return Outcome({"packs": sent}, f"sent {sent} packs")


def _lazy(parser: ArgumentParser) -> None:
    parser.add_argument("--lazy", action="store_true", help="bring the bytes when they are read")


def _pull(store: Store, args: Namespace) -> Any:
    learnt = store.pull(args.name or None, not args.lazy, args.force)
    return Outcome({"names": learnt}, "\n".join(learnt) or "nothing new")


def _sync(store: Store, args: Namespace) -> Any:
    sent, learnt = store.sync()
    text = f"sent {sent} packs, learnt of {', '.join(learnt) or 'nothing new'}"
    return Outcome({"packs": sent, "names": learnt}, text)


def _size(parser: ArgumentParser) -> None:
    parser.add_argument("size", help="bytes to let go, for example 2GiB")


def _evict(store: Store, args: Namespace) -> Any:
    freed = store.evict(args.size)
    return Outcome({"bytes": freed}, f"let {freed} bytes go; the remote store has them")


def _listed(records: Any) -> Outcome:
    rows = [(f"{r.name} v{r.version}", r.record[:12], r.model, r.message) for r in records]
    header = ("version", "record", "model", "message")
    return Outcome(records, table(header, rows) if rows else "none")


STORE_VERBS: tuple[Verb, ...] = (
    _verb(
        "branch",
        "give a stored memory another name",
        lambda store, args: store.branch(args.ref, args.name, args.message),
        "handbook@{1} handbook-old",
        _ref,
        _name,
        _message,
    ),
    _verb(
        "tag",
        "give a stored memory a name that does not move",
        lambda store, args: store.tag(args.ref, args.name, args.message),
        "handbook handbook-v1",
        _ref,
        _name,
        _message,
    ),
    _verb(
        "rollback",
        "make an earlier version the newest again",
        lambda store, args: store.rollback(
            args.name, int(args.to) if len(args.to) < 6 and args.to.isdigit() else args.to
        ),
        "handbook --to 1",
        _name,
        _rollback,
    ),
    _verb(
        "annotate",
        "note tags, source, licence and evaluation results beside a version",
        _annotate,
        "handbook --metric kl=0.002",
        _ref,
        _labels,
    ),
    _verb("pin", "keep a name out of eviction and expiry", _pin, "handbook", _name),
    _verb("unpin", "take a pin away", _unpin, "handbook", _name),
    _verb(
        "ancestors",
        "the stored memories that one was made of",
        lambda store, args: _listed(store.ancestors(args.ref)),
        "handbook",
        _ref,
    ),
    _verb(
        "descendants",
        "everything that was made of a memory, or of a source",
        lambda store, args: _listed(store.descendants(args.ref)),
        "handbook",
        _ref,
    ),
    _verb(
        "gc",
        "remove the bytes that no name can reach",
        lambda store, args: store.gc(args.waste),
        "",
        _waste,
    ),
    _verb("fsck", "read every byte and say what is wrong", _fsck, "--repair", _fsck_options),
    _verb("du", "which bytes belong to whom", lambda store, args: store.du(), ""),
    _verb("stats", "what the tiers hold", _stats, ""),
    _verb(
        "export",
        "write one memory to one file",
        _export,
        "handbook handbook.kv",
        _ref,
        _file,
        _export_options,
    ),
    _verb(
        "import",
        "take a memory from a file",
        _import,
        "handbook.kv",
        _file,
        _import_options,
        _force,
    ),
    _verb(
        "push",
        "send what the remote store lacks",
        _push,
        "--remote s3://bucket/memories",
        _names,
        _force,
    ),
    _verb(
        "pull",
        "bring what the remote store has",
        _pull,
        "--remote s3://bucket/memories",
        _names,
        _lazy,
        _force,
    ),
    _verb("sync", "pull, then push", _sync, "--remote s3://bucket/memories"),
    _verb(
        "evict",
        "let bytes go that the remote store has",
        _evict,
        "2GiB --remote s3://bucket/memories",
        _size,
    ),
)
"""The verbs, in the order of the help."""
