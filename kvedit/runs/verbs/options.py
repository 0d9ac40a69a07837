"""Arguments that several verbs share, and what they stand for."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvedit.memory import KVMemory
    from kvedit.store import Store

__all__ = [
    "CODECS",
    "REF",
    "add_model",
    "add_prompt",
    "add_put",
    "add_store",
    "duration",
    "load_model",
    "load_model_of",
    "newest",
    "note",
    "open_store",
    "positive",
    "put_options",
]

REF = "name, name@{1}, digest or the beginning of one"
"""What a reference is, for the help."""

CODECS = ("raw", "planes-zstd", "int8", "int4", "int2", "recipe")
"""What ``--codec`` takes; named here so that the parser imports no store."""

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw]?)")


def add_store(parser: ArgumentParser) -> None:
    """Adds ``--store``, and how to reach and read it. Credentials come from the environment."""
    store = parser.add_argument_group("store")
    store.add_argument(
        "--store",
        metavar="PLACE",
        default=os.environ.get("KVEDIT_STORE") or "memories",
        help="the store's folder, or a URL such as s3://bucket/prefix (default: $KVEDIT_STORE, "
        "else memories)",
    )
    store.add_argument("--remote", metavar="URL", help="a remote store below the folder")
    store.add_argument("--endpoint", metavar="URL", help="of a bucket that is not its cloud's own")
    store.add_argument(
        "--allow-http", action="store_true", help="reach the endpoint without encryption"
    )
    store.add_argument(
        "--key-file", metavar="FILE", help="the store's key: everything is encrypted at rest"
    )
    store.add_argument("--namespace", metavar="NAME", default="", help="the tenant")
    store.add_argument(
        "--trusted",
        metavar="KEY",
        action="append",
        default=[],
        help="a public key; what none of them signed is not read; repeatable",
    )
    store.add_argument("--capacity", metavar="SIZE", help="what the folder may hold: 10GiB")


def add_put(parser: ArgumentParser) -> None:
    """Adds how a new version is stored and what is noted beside it."""
    parser.add_argument("--message", metavar="TEXT", default="", help="what to say about it")
    parser.add_argument("--tag", action="append", default=[], help="a label; may be repeated")
    parser.add_argument("--source", metavar="TEXT", default="", help="where the text came from")
    parser.add_argument("--licence", metavar="TEXT", default="", help="of the text")
    parser.add_argument(
        "--ttl", type=duration, metavar="TIME", help="after which it goes by itself: 30m, 12h, 7d"
    )
    parser.add_argument(
        "--codec",
        choices=CODECS,
        default="raw",
        help="how to store it: raw; planes-zstd, lossless; int8, int4 or int2, lossy; recipe, "
        "only the steps",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="put also where somebody else moved the name, or the codec is coarser than the edit",
    )


def put_options(args: Namespace) -> dict[str, Any]:
    """Returns what :func:`add_put` asks for, as arguments of ``Store.put``.

    Raises:
        InvalidArgument: if a label can't be written down.
    """
    from kvedit.store.draft import Labels

    labels = {"source": args.source, "licence": args.licence, "ttl": args.ttl}
    labels |= {"message": args.message, "tags": args.tag}
    Labels.of(**labels)
    recipe = args.codec == "recipe"
    how = {"recipe": recipe, "codec": "raw" if recipe else args.codec, "force": args.force}
    return {**labels, **how}


def add_model(parser: ArgumentParser, default: str) -> None:
    """Adds the model and how to load it.

    Args:
        parser: the verb's parser.
        default: what happens without ``--model``, for the help.
    """
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="smollm2-135m (packaged), a folder, a hub id, or tiny:FAMILY (a random toy, for "
        f"example tiny:llama); default: {default}",
    )
    parser.add_argument("--dtype", help="compute dtype, for example bfloat16")
    parser.add_argument("--device", help="for example cuda; default: cpu")
    parser.add_argument("--attn", metavar="NAME", help="attention implementation: sdpa, eager, …")


def add_prompt(parser: ArgumentParser) -> None:
    """Adds how a prompt meets a memory."""
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take the prompt as a chat turn, or as text; default: as the memory was captured",
    )
    parser.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="attach also where model, tokenizer or RoPE settings differ",
    )


def positive(text: str) -> int:
    """Returns a whole number of at least one, as an argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {number}")
    return number


def duration(text: str) -> float:
    """Returns seconds of a text like ``90``, ``30m``, ``12h``, ``7d`` or ``2w``, for argparse."""
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else math.nan
    if not math.isfinite(seconds):
        raise argparse.ArgumentTypeError(f"expected a time like 30m, 12h or 7d, found {text}")
    return seconds


def note(text: str) -> None:
    """Tells the user something that is no result: on stderr, where no pipe reads."""
    print(f"kvedit: {text}", file=sys.stderr)


def open_store(args: Namespace, place: str | None = None) -> Store:
    """Returns the store of ``--store``, or the one at ``place`` with the same key and tenant.

    Raises:
        InvalidArgument: if an option can't be used.
    """
    from kvedit.editors.replaying import rebuild
    from kvedit.store import Store

    key = Path(args.key_file) if args.key_file else None
    shared: dict[str, Any] = {"namespace": args.namespace, "key": key, "replay": rebuild}
    shared |= {"trusted_keys": tuple(args.trusted), "remote_options": _remote_options(args)}
    if place is not None:
        return Store(place, **shared)
    return Store(args.store, capacity=args.capacity, remote=args.remote, **shared)


def newest(store: Store, name: str) -> str:
    """Returns the record that a name points to, ``""`` for none: what a put expects to replace."""
    try:
        return str(store.log(name)[0].record)
    except NotFound:
        return ""


def _remote_options(args: Namespace) -> dict[str, Any]:
    from kvedit.store.urls import is_url

    found: dict[str, Any] = {"endpoint": args.endpoint} if args.endpoint else {}
    if args.allow_http:
        found["allow_http"] = True
    if found and not is_url(args.store) and args.remote is None:
        raise InvalidArgument("--endpoint and --allow-http are for a --store or --remote URL")
    return found


def load_model(
    name: str, dtype: str | None, device: str | None, attn: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a model and its tokenizer; ``tiny:FAMILY`` builds a random toy.

    Raises:
        InvalidArgument: if nothing of that name can be loaded.
        UnknownName: if there is no such tiny family.
    """
    from kvedit.models.loading import load

    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    return load(name, dtype=dtype, device=device, attn=attn)


def load_model_of(
    memory: KVMemory, args: Namespace
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model of ``--model``, or else the one that the memory names, in its dtype.

    Raises:
        InvalidArgument: if nothing of that name can be loaded.
    """
    if args.model:
        return load_model(args.model, args.dtype, args.device, args.attn)
    dtype = args.dtype or str(memory.dtype)
    try:
        return load_model(memory.model.name, dtype, args.device, args.attn)
    except InvalidArgument as error:
        raise InvalidArgument(
            f"{error} (the memory names this model; --model overrides)"
        ) from error
