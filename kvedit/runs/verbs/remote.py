"""``push``, ``pull``, ``sync`` and ``evict``: a folder and the remote store below it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import add_store, open_store

__all__ = ["EVICT", "PULL", "PUSH", "SYNC"]


def _add_push(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="default: all, removed ones as well")
    parser.add_argument(
        "--force", action="store_true", help="put ours on top of histories that went another way"
    )
    add_store(parser)


def _push(args: Namespace) -> Outcome:
    packs = open_store(args).push(args.names or None, args.force)
    return Outcome({"packs": packs}, f"{packs} packs sent")


def _add_pull(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument(
        "--lazy", action="store_true", help="bring bytes when they are read, not now"
    )
    parser.add_argument(
        "--force", action="store_true", help="put theirs on top of histories that went another way"
    )
    add_store(parser)


def _pull(args: Namespace) -> Outcome:
    learnt = open_store(args).pull(args.names or None, eager=not args.lazy, force=args.force)
    return Outcome({"names": learnt}, _learnt(learnt))


def _sync(args: Namespace) -> Outcome:
    packs, learnt = open_store(args).sync()
    return Outcome({"packs": packs, "names": learnt}, f"{_learnt(learnt)}\n{packs} packs sent")


def _learnt(names: list[str]) -> str:
    return f"news of {', '.join(names)}" if names else "no news"


def _add_evict(parser: ArgumentParser) -> None:
    parser.add_argument("size", help="how many bytes to let go: 500MiB")
    add_store(parser)


def _evict(args: Namespace) -> Outcome:
    from kvedit.memory.show import human_bytes
    from kvedit.store.urls import is_url

    if args.remote is None and not is_url(args.store):
        raise InvalidArgument("only what a remote store has may go: name it with --remote URL")
    freed = open_store(args).evict(args.size)
    return Outcome({"bytes": freed}, f"{human_bytes(freed)} let go; the remote store has them")


PUSH = Verb(
    "push",
    "send names to the remote store",
    _add_push,
    _push,
    "kvedit push handbook --remote s3://bucket/memories",
)
PULL = Verb(
    "pull",
    "learn names from the remote store, and bring their bytes",
    _add_pull,
    _pull,
    "kvedit pull --lazy --remote s3://bucket/memories",
)
SYNC = Verb(
    "sync",
    "pull all names, then push all",
    add_store,
    _sync,
    "kvedit sync --remote s3://bucket/memories",
)
EVICT = Verb(
    "evict",
    "let bytes go from the folder that the remote store has, least recently used first",
    _add_evict,
    _evict,
    "kvedit evict 500MiB --remote s3://bucket/memories",
)
