"""``kvedit edit``: one or several editors over a stored memory, put as a new version."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from functools import cached_property
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import (
    add_model,
    add_put,
    add_store,
    load_model_of,
    newest,
    note,
    open_store,
    put_options,
)
from kvedit.runs.verbs.parameters import build_editor

__all__ = ["EDIT"]


def _add(parser: ArgumentParser) -> None:
    parser.add_argument(
        "ref",
        nargs="+",
        help="name, name@{1}, digest or the beginning of one; several for editors that join them, "
        "or a memory and then the delta for `steer`",
    )
    parser.add_argument(
        "--editor",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "KEY=VALUE"),
        help="an editor and its parameters (see `kvedit editors`), as JSON, YAML lists and "
        "mappings, or plain text; repeat it to edit in several steps",
    )
    parser.add_argument(
        "--as", dest="name", metavar="NAME", help="name of the result; default: the same name"
    )
    add_store(parser)
    add_put(parser)
    add_model(parser, default="the one that made the memory; only some editors need one")


def _run(args: Namespace) -> Outcome:
    from kvedit.store.refs import check_name

    editors = [build_editor(words) for words in args.editor]
    args.message = args.message or "; ".join(map(shlex.join, args.editor))
    options = put_options(args)
    store = open_store(args)
    origins = [store.show(ref).record for ref in args.ref]
    if len(origins) > 1 and args.name is None:
        raise InvalidArgument("what several memories are joined into needs a name: --as NAME")
    name = check_name(args.name or origins[0].name)
    # A version that somebody else puts meanwhile must not vanish under this one.
    expect = None if args.force else newest(store, name)
    memories = [store.get(origin.record) for origin in origins]
    live = _Live(memories[0], args)
    reader = _reader(editors, live, args)
    for editor in editors:
        others = _operands(editor, store, live) if len(memories) == 1 else []
        memories = [editor(*memories, *others, reader=reader)]
    record = store.put(memories[0], name, expect=expect, **options)
    data = {
        **vars(record),
        "edited": [{"name": o.name, "version": o.version, "record": o.record} for o in origins],
        "editors": [
            {"editor": words[0], **editor.parameters()}
            for words, editor in zip(args.editor, editors, strict=True)
        ],
    }
    return Outcome(data, str(record))


class _Live:
    """The model of a memory, loaded when somebody needs it."""

    def __init__(self, memory: Any, args: Namespace) -> None:
        self.memory, self.args = memory, args

    @cached_property
    def pair(self) -> Any:
        return load_model_of(self.memory, self.args)


def _reader(editors: list[Any], live: _Live, args: Namespace) -> Any:
    reads = any(e.reproducibility == "reader" or getattr(e, "reads", False) for e in editors)
    if not reads:
        if args.model and not any(editor.operands for editor in editors):
            raise InvalidArgument("--model: none of these editors reads with a model; leave it out")
        return None
    from kvedit.runtime import ModelReader

    return ModelReader(*live.pair)


def _operands(editor: Any, store: Any, live: _Live) -> list[Any]:
    from kvedit.runs.operands import check_makeable, stored, supply

    found = [stored(store, kind, live.memory.model) for kind in editor.operands]
    if None not in found:
        return found
    for kind, operand in zip(editor.operands, found, strict=True):
        if operand is None:
            check_makeable(kind)  # before the model is loaded for nothing
    model, tokenizer = live.pair
    return supply(editor, store, model, tokenizer, note)


EDIT = Verb(
    "edit",
    "edit a stored memory and store the result as a new version",
    _add,
    _run,
    "kvedit edit handbook --editor emphasize span='within 60 days' strength=2.3 layers=[0,1]",
)
