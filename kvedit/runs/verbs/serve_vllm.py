"""``kvedit serve --engine vllm``: runs vLLM's own server with kvedit's connector, or prints how."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome
from kvedit.runs.verbs.options import note

if TYPE_CHECKING:
    from kvedit.store import Store

__all__ = ["add_vllm", "serve_by_vllm"]

_PYTHON = ".venv-vllm/bin/python"  # where make vllm-env puts it


def add_vllm(parser: ArgumentParser) -> None:
    """Adds what only vLLM's server takes."""
    group = parser.add_argument_group("--engine vllm")
    group.add_argument(
        "--print", action="store_true", dest="show", help="print the command, and run nothing"
    )
    group.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        metavar="WORD",
        help="a further word for vLLM's server; repeatable: --engine-arg=--max-model-len=4096",
    )


def serve_by_vllm(
    args: Namespace, store: Store, place: str, name: str, dtype: str | None, capacity: int
) -> Outcome:
    """Runs the server in place of this process, or returns the command where vLLM is not.

    Args:
        args: what the user said.
        store: the store.
        place: what the user called it.
        name: the model.
        dtype: that takes all memories.
        capacity: bytes of memories that the server keeps.

    Returns:
        The command, where it is only printed.

    Raises:
        InvalidArgument: for an option that vLLM's server can't follow.
        UnsupportedModel: if the vLLM of this environment is another than the tested one.
    """
    from kvedit.serving.vllm.command import installed_version, vllm_command, vllm_problems

    if args.endpoint or args.allow_http or not args.strict or args.device or args.attn:
        raise InvalidArgument(
            "--endpoint, --allow-http, --no-strict, --device and --attn are for --engine hf: vLLM "
            "serves from a folder, and only memories of its own model"
        )
    for problem in vllm_problems(store):
        note(problem)
    here = installed_version() is not None
    folder, tokenizer = _files(name)
    words = vllm_command(
        place,
        folder,
        tokenizer=tokenizer,
        python=sys.executable if here else _PYTHON,
        arguments=tuple(args.engine_arg),
        host=args.host,
        port=args.port,
        dtype=dtype,
        served_model_name=name,
        namespace=args.namespace,
        key=args.key_file,
        trusted_keys=list(args.trusted),
        remote=args.remote,
        capacity=capacity,
    )
    if args.show or not here:
        if not here:
            note("vLLM is not installed here: make vllm-env, and run this")
        return Outcome({"command": words, "model": name}, shlex.join(words))
    environment = dict(os.environ)
    if args.api_key:  # not among the words: other users can read those
        environment["VLLM_API_KEY"] = args.api_key
    sys.stdout.flush()
    os.execve(words[0], words, environment)


def _files(name: str) -> tuple[str, Any]:
    """Returns the model's folder or hub id, and its tokenizer."""
    from transformers import AutoTokenizer

    from kvedit.models.loading import TINY
    from kvedit.models.packaged import PACKAGED, packaged_folder

    if name.startswith(TINY):
        raise InvalidArgument(f"{name} has no files: vLLM needs a folder or a hub id")
    folder = str(packaged_folder()) if name == PACKAGED else name
    try:
        return folder, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"can't load the tokenizer of {name}: {error}") from error
