"""``kvedit capture``: a text or a chat as a model remembers it, put into a store."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import (
    add_model,
    add_put,
    add_store,
    load_model,
    open_store,
    put_options,
)

__all__ = ["CAPTURE"]


def _add(parser: ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("text", nargs="?", metavar="FILE", help="a text file; - reads stdin")
    source.add_argument(
        "--messages", metavar="FILE", help="chat messages: JSON, a list of role and content"
    )
    parser.add_argument("--name", help="name in the store; default: the file's, without suffix")
    add_store(parser)
    add_put(parser)
    add_model(parser, default="smollm2-135m")
    parser.add_argument(
        "--window",
        choices=("whole", "windowed"),
        default="whole",
        help="slots that sliding-window layers keep: all, or those that later tokens can see",
    )


def _run(args: Namespace) -> Outcome:
    from kvedit.store.refs import check_name

    # Everything that can be wrong without the model is found before the model is loaded.
    context = _text(args.text) if args.messages is None else _messages(args.messages)
    name = check_name(args.name or _stem(args.text or args.messages))
    options = put_options(args)
    store = open_store(args)
    from kvedit.models.packaged import PACKAGED

    model, tokenizer = load_model(args.model or PACKAGED, args.dtype, args.device, args.attn)
    from kvedit.runtime import capture

    memory = capture(model, tokenizer, context, window=args.window)
    record = store.put(memory, name, **options)
    return Outcome(record, str(record))


def _text(path: str) -> str:
    text = _read(path)
    # A tokenizer that puts a BOS in front would make one slot of nothing.
    if not text.strip():
        raise InvalidArgument(f"{_place(path)} holds no text: there is nothing to capture")
    return text


def _messages(path: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(_read(path))
    except ValueError as error:
        raise InvalidArgument(f"{_place(path)} is no JSON: {error}") from error
    if not isinstance(found, list) or not found or not all(isinstance(m, dict) for m in found):
        raise InvalidArgument(
            f'{_place(path)}: expected a list of messages, [{{"role": "user", "content": "…"}}]'
        )
    return found


def _read(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{_place(path)} is no UTF-8 text: {error}") from error
    except OSError as error:
        raise InvalidArgument(f"can't read {path}: {error.strerror}") from error


def _place(path: str) -> str:
    return "stdin" if path == "-" else path


def _stem(path: str) -> str:
    if path == "-":
        raise InvalidArgument("a text from stdin needs a name: --name NAME")
    return Path(path).stem


CAPTURE = Verb(
    "capture",
    "read a text or chat with a model and store its memory",
    _add,
    _run,
    "kvedit capture handbook.txt --name handbook --message 'as of June'",
)
