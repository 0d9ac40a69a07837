"""Arguments that several verbs share, and what they stand for."""

from __future__ import annotations

import argparse
import os
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from kvedit.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvedit.memory import KVMemory
    from kvedit.store import Store

__all__ = [
    "add_labels",
    "add_model",
    "add_prompt",
    "add_store",
    "load_model",
    "load_model_of",
    "note",
    "open_store",
    "positive",
]


def add_store(parser: ArgumentParser) -> None:
    """Adds ``--store``."""
    parser.add_argument(
        "--store",
        metavar="FOLDER",
        default=os.environ.get("KVEDIT_STORE") or "memories",
        help="the store's folder (default: $KVEDIT_STORE, else memories)",
    )


def add_labels(parser: ArgumentParser) -> None:
    """Adds what is noted beside a new version."""
    parser.add_argument("--message", metavar="TEXT", default="", help="what to say about it")
    parser.add_argument("--tag", action="append", default=[], help="a label; may be repeated")


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


def note(text: str) -> None:
    """Tells the user something that is no result: on stderr, where no pipe reads."""
    print(f"kvedit: {text}", file=sys.stderr)


def open_store(args: Namespace) -> Store:
    """Returns the store of ``--store``."""
    from kvedit.store import Store

    return Store(args.store)


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
