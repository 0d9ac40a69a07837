"""Sealed: one memory as one self-contained run of bytes, a pack with all of its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvedit.errors import CorruptMemory
from kvedit.memory import KVMemory
from kvedit.memory.digest import digest_bytes
from kvedit.store.crypt import Cipher
from kvedit.store.holding import HeldPack
from kvedit.store.manifest import Manifest
from kvedit.store.pack import HEADER_LIMIT, Pack
from kvedit.store.packing import Encoded, build_pack
from kvedit.store.plan import check_sealed, plan_parts
from kvedit.store.reader import Verify, assemble, read_planned

__all__ = ["BufferPack", "open_buffer", "read_paper", "read_sealed", "seal"]


@dataclass(frozen=True)
class BufferPack:
    """A pack that lies in memory.

    Args:
        pack: what its header says.
        buffer: its bytes, ``[byte]`` uint8.
    """

    pack: Pack
    buffer: torch.Tensor

    def data(self, offset: int, size: int) -> torch.Tensor:
        """Returns bytes of the pack, ``[byte]`` uint8."""
        return self.buffer[offset : offset + size]


def seal(
    memory: KVMemory,
    manifest: bytes,
    cipher: Cipher | None = None,
    note: Mapping[str, Any] | None = None,
) -> Encoded:
    """Returns a pack that holds all of a memory.

    Args:
        memory: the memory.
        manifest: the canonical bytes of its manifest.
        cipher: seals it, or None.
        note: plain data to write down in the header.
    """
    different = {block.digest: block for block in memory.to("cpu").cut()}
    papers = {digest_bytes(manifest): manifest}
    return build_pack(list(different.values()), papers, cipher=cipher, note=note)


def open_buffer(data: bytes | bytearray | memoryview, where: str) -> BufferPack:
    """Returns the pack that these bytes are.

    Args:
        data: the bytes.
        where: what to call them in an error.

    Raises:
        CorruptMemory: if they are no pack, or cut off or extended.
    """
    view = memoryview(data)
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > min(len(view) - 8, HEADER_LIMIT):
        raise CorruptMemory(f"{where} is cut off or its header is damaged")
    head = bytes(view[: 8 + length])
    pack = Pack.parse(head, digest_bytes(head), len(view), where)
    # Tensors are made over these bytes: over a copy where they can't be written to.
    buffer = torch.frombuffer(view if not view.readonly else bytearray(view), dtype=torch.uint8)
    return BufferPack(pack, buffer)


def read_paper(held: HeldPack, record: str, cipher: Cipher | None) -> bytes:
    """Returns the bytes of a manifest in a pack; their digest is not checked yet.

    Raises:
        CorruptMemory: if the pack does not have it.
        InvalidArgument: if it is encrypted and the key is missing or another one.
    """
    place = held.pack.manifests.get(record)
    if place is None:
        raise CorruptMemory(f"pack {held.pack.digest} has no manifest {record}")
    check_sealed(held.pack.digest, held.pack.cipher, cipher)
    data = held.data(place.offset, place.size).numpy().tobytes()
    return data if cipher is None else cipher.open(data, record, "manifest")


def read_sealed(
    held: HeldPack, record: str, verify: Verify = "full", cipher: Cipher | None = None
) -> tuple[KVMemory, Manifest]:
    """Returns the memory of a self-contained pack, and its manifest.

    Args:
        held: the pack.
        record: record digest of the memory.
        verify: what to check.
        cipher: opens what is encrypted.

    Raises:
        CorruptMemory: if a byte is not what was put.
        InvalidArgument: if it is encrypted and the key is missing or another one.
    """
    manifest = Manifest.parse(read_paper(held, record, cipher), record, f"manifest {record}")
    packs = dict.fromkeys(held.pack.entries, held)
    plan = plan_parts(list(manifest.parts.values()), packs, cipher)
    tensors = read_planned(plan, {held.pack.digest: held}, verify, cipher)
    return assemble(manifest, tensors, verify != "off"), manifest
