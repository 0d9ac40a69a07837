"""Exporting: a memory's whole chunks put into an LMCache server, and read back.

LMCache never replaces what it holds for the same model, tokens and salt (0.5.6, seen). The salt is
the memory's digest, so an edit is another salt; and what was there before under this one must be
these bits, or the export fails.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvedit.errors import CorruptMemory, InvalidArgument, TierUnavailable
from kvedit.memory import KVMemory
from kvedit.serving.lmcache.chunks import Chunked, chunked
from kvedit.serving.lmcache.layouts import Layout
from kvedit.serving.lmcache.pool import Pool
from kvedit.serving.lmcache.server import Server
from kvedit.serving.lmcache.wire import Wire

__all__ = ["LMCacheExport", "to_lmcache"]


@dataclass(frozen=True)
class LMCacheExport:
    """What lies in the server, and how an engine is asked for it.

    Args:
        salt: the memory's content digest; ``cache_salt`` of every request.
        tokens: token ids that a prompt begins with, those of the tail included.
        slots: slots that the server holds, each read back and compared.
        tail: slots behind them, which the engine computes from their tokens.
        written: chunks that were written now; the others were there before.
        layout: how the bytes lie.
    """

    salt: str
    tokens: tuple[int, ...]
    slots: int
    tail: int
    written: int
    layout: str

    def completion(self, ids: Sequence[int], **options: Any) -> dict[str, Any]:
        """Returns the body of ``POST /v1/completions``.

        Args:
            ids: tokens behind the memory, as ``kvedit.serving.request(...)`` has them behind its
                placeholders.
            **options: further fields, such as ``max_tokens``.
        """
        return {**options, "prompt": [*self.tokens, *ids], "cache_salt": self.salt}


def to_lmcache(
    memory: KVMemory,
    url: str,
    model: str,
    *,
    layout: str | None = None,
    block: int = 0,
    recompute_tail: bool = False,
    timeout: float = 20.0,
) -> LMCacheExport:
    """Puts a memory's whole chunks into an LMCache server of this machine, and reads them back.

    Args:
        memory: one slot per token, from position 0 on.
        url: of the server's HTTP endpoint, such as ``http://127.0.0.1:8080``.
        model: what the engine calls its model: for vLLM, what it was started with.
        layout: a name of :data:`~kvedit.serving.lmcache.layouts.LAYOUTS`; None asks the engine.
        block: tokens of a page of an engine on a CPU; 0 asks the engine.
        recompute_tail: take it that the engine computes the tail of an edited memory itself.
        timeout: seconds that an answer may take.

    Returns:
        What lies in the server now; the server may drop it whenever it needs room.

    Raises:
        InvalidArgument: if the memory can't be held by LMCache, or the layout is not known.
        UnsupportedModel: if the server is of another version, or the model can't be served.
        TierUnavailable: if the server does not answer, is started otherwise, or has no room.
        CorruptMemory: if it has other bits under the memory's digest.
        MissingDependency: without pyzmq or msgspec.
    """
    if "@" in model or not model:
        raise InvalidArgument(f"model: expected the engine's name, without @, found {model!r}")
    server = Server.at(url, timeout)
    form = server.layout(model, memory.dtype, layout, block)
    cut = chunked(memory, server.chunk, recompute_tail)
    with Wire(server.address, timeout) as wire, _registered(wire, model, cut, form) as writer:
        written = writer.write()
        writer.compare(timeout)
    return LMCacheExport(cut.salt, cut.tokens, cut.slots, cut.tail, written, form.name)


@dataclass(frozen=True, eq=False)
class _Writer:
    """Writes and compares the chunks of one memory."""

    wire: Wire
    pool: Pool
    instance: int
    model: str
    cut: Chunked
    form: Layout

    def write(self) -> int:
        """Returns how many chunks were not there and are now."""
        with self._session(self.cut.slots) as key:
            context = self.wire.ask("prepare_store", key, self.instance)["context"]
            if "slots" not in context:
                raise TierUnavailable("the LMCache server shares no memory: give it --shm-name")
            places, indices = context["slots"], context.get("chunk_indices", [])
            for place, index in zip(places, indices, strict=True):
                self.pool.write(place, self.form.payload(*self.cut.chunk(index)))
            if places and not self.wire.ask("commit_store", key, self.instance, b""):
                raise TierUnavailable("the LMCache server did not take the chunks")
        return len(places)

    def compare(self, timeout: float) -> None:
        """Raises unless the server finds every chunk by tokens and salt, bit for bit."""
        with self._session(self.cut.slots) as key:
            self.wire.ask("lookup", {**key, "worker_id": None}, 1)
            name = key["request_id"]
            found = self.wire.ask("wait_prefetch_status", name, timeout / 2) or 0
            if found:
                self._compare({**key, "end": found * self.cut.size}, found)
        if found < self.cut.count:
            raise TierUnavailable(
                f"the LMCache server holds {found} of {self.cut.count} chunks: it has no room "
                "(--l1-size-gb), or something else is being written under this name"
            )

    def _compare(self, key: Mapping[str, Any], found: int) -> None:
        got = self.wire.ask("prepare_retrieve", key, self.instance)
        places = got["context"].get("slots", [])
        try:
            wrong = [
                index
                for index, place in enumerate(places)
                if not self.pool.holds(place, self.form.payload(*self.cut.chunk(index)))
            ]
        finally:
            self.wire.ask("commit_retrieve", key, self.instance)
        if len(places) != found:
            raise TierUnavailable(f"the LMCache server gave {len(places)} of {found} chunks")
        if wrong:
            raise CorruptMemory(
                f"LMCache holds other bits in chunks {wrong} under {self.cut.salt[:12]}: an engine "
                "asked before the export, or another layout wrote them. LMCache replaces nothing: "
                "delete them (POST /cache/clear), and export again"
            )

    @contextmanager
    def _session(self, end: int) -> Iterator[dict[str, Any]]:
        """Yields a key; the server forgets the request afterwards."""
        key = _key(self.model, self.cut.tokens[:end], self.cut.salt)
        try:
            yield key
        finally:
            self.wire.ask("end_session", key["request_id"])


def _key(model: str, tokens: Sequence[int], salt: str) -> dict[str, Any]:
    """What LMCache makes a chunk's name of, for an engine of one worker."""
    return {
        "model_name": model,
        "world_size": 1,
        "worker_id": 0,
        "token_ids": list(tokens),
        "start": 0,
        "end": len(tokens),
        "request_id": f"kvedit-{uuid.uuid4().hex}",
        "cache_salt": salt,
        "request_configs": None,
        "num_kv_readers": 1,
    }


@contextmanager
def _registered(wire: Wire, model: str, cut: Chunked, form: Layout) -> Iterator[_Writer]:
    """Yields a writer that the server knows, and takes its registration back."""
    heads, _, dim = cut.plain.keys[0].shape
    instance = secrets.randbits(62)
    told = wire.ask(
        "register_kv_cache_engine_driven_context",
        {
            "instance_id": instance,
            "model_name": model,
            "world_size": 1,
            "block_size": form.block or cut.size,
            "num_layers": len(cut.plain.keys),
            "hidden_dim_size": form.width(heads, dim),
            "dtype_str": str(cut.plain.keys[0].dtype).removeprefix("torch."),
            "use_mla": form.one_plane,  # LMCache's word for a single plane
            "num_physical_slots": cut.size,
        },
    )
    try:
        if not told["shm_name"]:
            raise TierUnavailable("the LMCache server shares no memory: give it --shm-name")
        with Pool(told["shm_name"], told["pool_size"]) as pool:
            yield _Writer(wire, pool, instance, model, cut, form)
    finally:
        wire.ask("unregister_kv_cache_engine_driven_context", instance)
