"""Server: what an LMCache server says of itself over HTTP, and which layout its engine has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import torch

from kvedit.errors import InvalidArgument, TierUnavailable, UnsupportedModel
from kvedit.serving.lmcache.layouts import LAYOUTS, Layout, layout_of_format

__all__ = ["LMCACHE", "Server"]

LMCACHE = "0.5.6"
"""Version of LMCache that the export was tested with; the protocol is nobody's promise."""

_START = (
    "start it with: lmcache server --host 127.0.0.1 --supported-transfer-mode auto "
    "--shm-name NAME --no-l1-use-lazy"
)


@dataclass(frozen=True)
class Server:
    """A server that memories can be exported to.

    Args:
        address: where it takes requests over ZeroMQ.
        chunk: tokens of a chunk.
        status: what it says of the engines that are registered.
    """

    address: str
    chunk: int
    status: Mapping[str, Any]

    @classmethod
    def at(cls, url: str, timeout: float) -> Server:
        """Returns the server whose HTTP endpoint is ``url``.

        Args:
            url: such as ``http://127.0.0.1:8080``.
            timeout: seconds that an answer may take.

        Raises:
            InvalidArgument: if it is no such URL.
            TierUnavailable: if it does not answer, or is started in a way that takes no exports.
            UnsupportedModel: if it is of another version.
        """
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise InvalidArgument(
                f"LMCache server: expected the URL of its HTTP endpoint, such as "
                f"http://127.0.0.1:8080, found {url!r}"
            )
        version = str(_read(url, "version", timeout)).split("-")[0]
        if version != LMCACHE:
            raise UnsupportedModel(
                f"the export was tested with LMCache {LMCACHE}, {url} runs {version[:20]}"
            )
        config = _read(url, "config", timeout)["mp"]
        _check_started(config)
        address = f"tcp://{parts.hostname}:{config['port']}"
        return cls(address, int(config["chunk_size"]), _read(url, "status", timeout))

    def layout(self, model: str, dtype: torch.dtype, name: str | None, block: int) -> Layout:
        """Returns the layout that an engine of this model reads.

        Args:
            model: the name that the engine gave its model.
            dtype: of the memory's keys and values.
            name: the user's word for it; None asks the engine that is registered.
            block: tokens of a page of a CPU engine; 0 asks as well.

        Raises:
            InvalidArgument: if no engine says its layout, or it does not fit.
            UnknownName: if there is no layout of that name.
        """
        groups = _groups(self.status, model)
        for group in groups:
            if group["dtype"].removeprefix("torch.") != str(dtype).removeprefix("torch."):
                raise InvalidArgument(
                    f"the engine keeps {group['dtype']}, the memory {dtype}: export "
                    f"memory.to(dtype={group['dtype']})"
                )
        found = {layout_of_format(group["engine_kv_format"]) for group in groups}
        if len(groups) > 1 or (name is not None and found - {name}):
            raise InvalidArgument(
                f"engines of {model} are registered with layouts {sorted(found)} in {len(groups)} "
                f"groups; expected one, {name or 'of any kind'}"
            )
        if name is None and not found:
            raise InvalidArgument(
                f"no engine on a GPU is registered for {model}, so nothing says how its keys and "
                f"values lie: start the engine first, or pass layout={' or '.join(LAYOUTS)}"
            )
        chosen = name or found.pop()
        if chosen == "vllm-cpu":
            if dtype != torch.float32:
                # In bfloat16, machines with AMX pack their pages in another way.
                raise InvalidArgument(f"layout vllm-cpu: expected float32, found {dtype}")
            block = block or _page(self.status, model)
        return Layout(chosen, block)


def _check_started(config: Mapping[str, Any]) -> None:
    wrong = [
        f"{name} {config.get(name)!r}"
        for name, right in (
            ("transport", config.get("transport") == "zmq"),
            ("supported_transfer_mode", config.get("supported_transfer_mode") != "lmcache_driven"),
            ("shm_name", bool(config.get("shm_name"))),
            ("engine_type", config.get("engine_type") == "default"),
        )
        if not right
    ]
    if wrong:
        raise TierUnavailable(f"the LMCache server has {', '.join(wrong)}: {_START}")


def _groups(status: Mapping[str, Any], model: str) -> list[Mapping[str, Any]]:
    """Every different kind of layers that engines of the model have registered."""
    found: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for engine in status.get("cache_context_meta", {}).values():
        if engine["model_name"] != model:
            continue
        if engine["world_size"] != 1:
            raise InvalidArgument(
                f"the engine splits {model} over {engine['world_size']} workers; only whole "
                "models are exported"
            )
        for number, group in enumerate(engine["kv_cache_layout"]["kernel_groups"]):
            found[str(number), group["engine_kv_format"], group["dtype"]] = group
    return list(found.values())


def _page(status: Mapping[str, Any], model: str) -> int:
    engines = status.get("non_cuda_context_meta", {}).values()
    sizes = {one["block_size"] for one in engines if one["model_name"] == model}
    return int(sizes.pop()) if len(sizes) == 1 else 0


def _read(url: str, path: str, timeout: float) -> Any:
    try:
        # Without a proxy of the environment: the server is on this machine.
        with build_opener(ProxyHandler({})).open(f"{url.rstrip('/')}/{path}", None, timeout) as got:
            return json.load(got)
    except (URLError, OSError, ValueError) as error:
        raise TierUnavailable(f"no LMCache server answers at {url}/{path}: {error}") from error
