"""Draft: a put as it was asked for, and as it is once it is cut, named and signed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.blocks import Block
from kvedit.memory.digest import digest_bytes
from kvedit.store.codecs import LOSSY, CodecError, approximate
from kvedit.store.dtypes import dtype_name
from kvedit.store.holding import HeldPack
from kvedit.store.manifest import encode_manifest
from kvedit.store.refs import check_labels, check_name
from kvedit.store.sign import Signer

__all__ = ["Draft", "Labels", "Prepared", "check_metrics", "prepare", "put_event"]


@dataclass(frozen=True)
class Labels:
    """What is said of a version; in none of its digests.

    Args:
        message: what to say about it.
        tags: its tags.
        source: where its text came from.
        licence: of its text.
        metrics: evaluation results by name.
        expires: when it goes by itself, in UTC, or None.
    """

    message: str = ""
    tags: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    expires: datetime | None = None

    @classmethod
    def of(
        cls,
        message: str = "",
        tags: Iterable[str] = (),
        source: str = "",
        licence: str = "",
        metrics: Mapping[str, float] | None = None,
        ttl: float | None = None,
    ) -> Labels:
        """Returns checked labels.

        Args:
            message: what to say about it.
            tags: its tags.
            source: where its text came from.
            licence: of its text.
            metrics: evaluation results by name.
            ttl: seconds until it goes by itself.

        Raises:
            InvalidArgument: if one can't be written down.
        """
        expires = None
        if ttl is not None:
            if not 0 < ttl < 1e10:
                raise InvalidArgument(f"ttl is a positive number of seconds, found {ttl!r}")
            expires = datetime.now(UTC) + timedelta(seconds=ttl)
        found = check_labels(message, tags)
        check_labels(source, ())
        check_labels(licence, ())
        return cls(message, found, source, licence, check_metrics(metrics or {}), expires)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, as the log has it."""
        expires = self.expires.isoformat(timespec="microseconds") if self.expires else None
        return {
            "message": self.message,
            "tags": list(self.tags),
            "source": self.source,
            "licence": self.licence,
            "metrics": dict(self.metrics),
            "expires": expires,
        }


@dataclass(frozen=True, eq=False)
class Draft:
    """A put as it was asked for.

    Args:
        memory: what to put.
        name: where to put it.
        labels: what is said of it.
        codec: how to store its blocks.
        expect: record that the name must point to, ``""`` for none; None for where it points when
            the put begins.
        force: put, wherever the name points.
        fixed: whether the name is a tag from now on.
    """

    memory: KVMemory
    name: str
    labels: Labels = field(default_factory=Labels)
    codec: str = "raw"
    expect: str | None = None
    force: bool = False
    fixed: bool = False

    def __post_init__(self) -> None:
        """Checks the name."""
        check_name(self.name)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A put that is ready to be written.

    Args:
        draft: what was asked for.
        memory: what is stored; for a lossy codec not quite ``draft.memory``.
        cut: its blocks.
        originals: for a lossy codec, the blocks that it is encoded from.
        manifest: canonical bytes.
        event: what the log will say, without packs.
        error: of a lossy codec.
        stored: a pack to copy the blocks from as they are, or None.
    """

    draft: Draft
    memory: KVMemory
    cut: list[Block]
    originals: dict[str, torch.Tensor]
    manifest: bytes
    event: dict[str, Any]
    error: CodecError | None = None
    stored: HeldPack | None = None


def prepare(draft: Draft, signer: Signer | None, namespace: str) -> Prepared:
    """Returns the draft cut into blocks, with its digests.

    Args:
        draft: what was asked for.
        signer: signs the record digest, or None.
        namespace: what the signature is bound to.

    Raises:
        MutatedMemory: if a tensor was written in place.
        InvalidArgument: if the codec can't take the memory.
    """
    draft.memory.check_unmodified()
    given = draft.memory.to("cpu")
    memory, error = given, None
    if draft.codec != "raw":
        memory, error = approximate(given, draft.codec)
    cut = memory.cut()
    manifest, content = encode_manifest(memory, cut, draft.codec)
    record = digest_bytes(manifest)
    event = put_event(draft.name, draft.labels, record, memory, cut)
    event |= {"content": content, "codec": draft.codec, "fixed": draft.fixed}
    if signer is not None:
        event["signature"] = signer.sign(record, namespace).to_json()
    if draft.codec in LOSSY and error is not None:
        event["codec_error"] = error.to_json()
    return Prepared(draft, memory, cut, _originals(given, cut, draft.codec), manifest, event, error)


def _step_ids(memory: KVMemory) -> list[str]:
    """Returns the ids of a memory's steps, the last one last.

    Before them come inputs that no step made: these are content digests.
    """
    nodes = memory.lineage.nodes
    ids = [node.id for node in nodes]
    bare = {given: None for node in nodes for given in node.inputs if given not in ids}
    return [*bare, *ids]


def put_event(
    name: str, labels: Labels, record: str, memory: KVMemory, cut: list[Block]
) -> dict[str, Any]:
    """Returns what the log says of a put, whatever is put.

    Args:
        name: the name.
        labels: what is said of the version.
        record: record digest.
        memory: the memory.
        cut: its blocks.
    """
    event = {"event": "put", "name": name, **labels.to_json(), "record": record}
    return {**event, "facts": _facts(memory, cut), "nodes": _step_ids(memory)}


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns evaluation results as they can be written down.

    Raises:
        InvalidArgument: if a name is no text, or a value no finite number.
    """
    for name, value in metrics.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # A float of 10 ** 400 does not exist, and an int of it does.
        if not isinstance(name, str) or not name or not number or not abs(value) < 1e300:
            raise InvalidArgument(
                f"metrics are names with finite numbers, found {name!r}: {value!r}"
            )
    return {name: float(value) for name, value in metrics.items()}


def _facts(memory: KVMemory, cut: list[Block]) -> dict[str, int | str]:
    """Returns what listings say of a memory.

    Args:
        memory: the memory.
        cut: its blocks.
    """
    return {
        "bytes": sum(block.tensor.nbytes for block in cut),
        "slots": memory.slots,
        "tokens": memory.tokens_count,
        "layers": len(memory.layers),
        "dtype": dtype_name(memory.dtype),
        "model": memory.model.name,
    }


def _originals(given: KVMemory, cut: list[Block], codec: str) -> dict[str, torch.Tensor]:
    if codec not in LOSSY:
        return {}
    tensors = {
        (index, kind): tensor
        for index, layer in given.layers.items()
        for kind, tensor in layer.tensors()
    }
    return {
        b.digest: tensors[b.layer, b.kind].narrow(b.axis, b.start, b.size)
        for b in cut
        if b.kind in ("keys", "values")
    }
