"""``kvedit serve``: answer requests in OpenAI's format from a store's memories."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import add_model, add_store, load_model, note, open_store, positive
from kvedit.runs.verbs.serve_vllm import add_vllm, serve_by_vllm

if TYPE_CHECKING:
    from kvedit.store import Store
    from kvedit.store.records import Entry

__all__ = ["SERVE"]


def _add(parser: ArgumentParser) -> None:
    parser.add_argument(
        "place", nargs="?", metavar="STORE", help="the store's folder or URL, as --store"
    )
    parser.add_argument(
        "--engine",
        choices=("hf", "vllm"),
        default="hf",
        help="hf, the default: transformers, here; vllm: vLLM's own server, in its environment",
    )
    add_store(parser)
    add_model(parser, default="the one that made the store's memories")
    parser.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="attach also where model, tokenizer or RoPE settings differ",
    )
    _add_server(parser)
    add_vllm(parser)


def _add_server(parser: ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine")
    server.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="default: 8000; 0 takes a free one"
    )
    server.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("KVEDIT_API_KEY"),
        help="what clients must send (default: $KVEDIT_API_KEY, which other users can't see)",
    )
    server.add_argument(
        "--max-queue", type=positive, default=64, metavar="N", help="prompts that may wait"
    )
    server.add_argument(
        "--max-tokens", type=positive, default=1024, metavar="N", help="new tokens of one answer"
    )
    server.add_argument(
        "--cache-bytes", metavar="SIZE", default="2GiB", help="memories kept in RAM; 0 keeps none"
    )


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, found {number}")
    return number


def _run(args: Namespace) -> Outcome:
    if args.engine == "vllm":
        return _run_vllm(args)
    from kvedit.serving.openai import Limits, create_app, run
    from kvedit.serving.openai.guard import LOOPBACK
    from kvedit.serving.openai.running import listen

    local = _is_loopback(args.host)
    with _opened(args) as store:
        limits = Limits(args.max_queue, args.max_tokens, _bytes(args.cache_bytes))
        name, dtype = (args.model, args.dtype) if args.model else _maker(store, args.dtype)
        with listen(args.host, args.port) as place:
            model, tokenizer = load_model(name, dtype, args.device, args.attn)
            app = create_app(
                model,
                tokenizer,
                store,
                name=name,
                limits=limits,
                key=args.api_key or None,
                hosts=LOOPBACK | {_spelled(args.host)} if local else None,
                strict=args.strict,
            )
            url = _url(args.host, place.getsockname()[1])
            if not local:
                note(_warning(args.host, args.api_key))
            count = f"{len(store)} {'memory' if len(store) == 1 else 'memories'}"
            served = f"serving {name} and {count} of {store.path} at {url}"
            run(app, place, lambda: note(served))
    return Outcome({"url": url, "model": name}, "")


def _run_vllm(args: Namespace) -> Outcome:
    with _opened(args) as store:
        name, dtype = (args.model, args.dtype) if args.model else _maker(store, args.dtype)
        # Left to itself, vLLM computes float32 checkpoints in half precision.
        dtype, capacity = dtype or _widest(store.ls()), _bytes(args.cache_bytes)
        return serve_by_vllm(args, store, args.place or args.store, name, dtype, capacity)


def _maker(store: Store, dtype: str | None) -> tuple[str, str]:
    """Returns the model that made a store's memories, and a dtype that takes all of them."""
    entries = store.ls()
    names = sorted({entry.model for entry in entries})
    if len(names) != 1:
        found = f"memories of {', '.join(names)}" if names else "no memory"
        raise InvalidArgument(f"{store.path} has {found}: say which model to load, by --model")
    return names[0], dtype or str(_widest(entries))


def _widest(entries: Iterable[Entry]) -> str | None:
    """Returns a dtype that takes all of these memories, or None where there is none."""
    import torch

    from kvedit.models.loading import as_dtype

    widest: Any = None
    for entry in entries:
        one = as_dtype(entry.dtype)
        widest = one if widest is None or one is None else torch.promote_types(widest, one)
    return None if widest is None else str(widest).removeprefix("torch.")


def _opened(args: Namespace) -> Store:
    place = args.store if args.place is None else args.place
    return open_store(Namespace(**{**vars(args), "store": place}))


def _bytes(text: str) -> int:
    from kvedit.store.room import parse_bytes

    return 0 if text.strip() == "0" else parse_bytes(text)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _url(host: str, port: int) -> str:
    return f"http://{_spelled(host)}:{port}/v1"


def _spelled(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _warning(host: str, key: str | None) -> str:
    who = "whoever has the API key" if key else "anybody (no --api-key)"
    return (
        f"{host} is not this machine alone: {who} that reaches it may read the memories' contents "
        "by asking, and nothing is encrypted on the way"
    )


SERVE = Verb(
    "serve",
    "answer OpenAI's clients from a store's memories over HTTP",
    _add,
    _run,
    "kvedit serve memories --port 8000",
)
