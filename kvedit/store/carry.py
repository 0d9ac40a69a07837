"""Carry: one memory in one self-contained file, out of a store and into another."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.digest import digest_bytes
from kvedit.store.crypt import Cipher
from kvedit.store.draft import check_metrics
from kvedit.store.holding import MappedPack
from kvedit.store.layout import write_all
from kvedit.store.manifest import Manifest
from kvedit.store.pack import Pack, read_head
from kvedit.store.packing import Encoded
from kvedit.store.refs import check_labels, check_name
from kvedit.store.sealed import read_paper, read_sealed

__all__ = ["Carried", "open_file", "travelling", "write_file"]

_LABELS = ("message", "tags", "source", "licence", "metrics", "signature", "name")


@dataclass(frozen=True, eq=False)
class Carried:
    """What a file holds.

    Args:
        memory: the memory, checked.
        manifest: its manifest.
        paper: the bytes of the manifest.
        note: name and labels that it had.
        held: the file.
    """

    memory: KVMemory
    manifest: Manifest
    paper: bytes
    note: Mapping[str, Any]
    held: MappedPack


def travelling(note: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a put's facts that travel with the memory."""
    return {key: note[key] for key in _LABELS if note.get(key)}


def write_file(path: Path, pack: Encoded) -> int:
    """Returns the bytes of a file that it writes, whole or not at all.

    Args:
        path: the file; it must not exist.
        pack: what to write.

    Raises:
        InvalidArgument: if the file exists, or its folder does not.
    """
    if path.exists() or not path.parent.is_dir():
        raise InvalidArgument(f"{path} exists, or its folder does not: choose another file")
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            for chunk in pack.chunks:
                write_all(file, chunk)
            os.fsync(file)
        finally:
            os.close(file)
        path.hardlink_to(temporary)  # fails where somebody else made it meanwhile
    except FileExistsError:
        raise InvalidArgument(f"{path} exists: choose another file") from None
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    return pack.size


def open_file(path: Path, record: str | None, cipher: Cipher | None) -> Carried:
    """Returns what a file holds, every byte checked.

    Args:
        path: the file.
        record: the record digest that it should hold; None takes the one that it names.
        cipher: opens it if it is encrypted.

    Raises:
        CorruptMemory: if it is no such file, or damaged, or holds another record.
        InvalidArgument: if there is no such file, or it is encrypted and the key is missing or
            another one.
    """
    if path.is_dir():
        raise InvalidArgument(f"{path} is a folder: name a file")
    try:
        head, size = read_head(path)
    except FileNotFoundError:
        raise InvalidArgument(f"{path} is missing: name a file that kvedit export wrote") from None
    pack = Pack.parse(head, digest_bytes(head), size, str(path))
    if len(pack.manifests) != 1 or record not in {None, *pack.manifests}:
        raise CorruptMemory(f"{path} does not hold {record or 'one memory'}")
    (found,) = pack.manifests
    held = MappedPack(pack, path)
    memory, manifest = read_sealed(held, found, "full", cipher)
    paper = read_paper(held, found, cipher)
    return Carried(memory, manifest, paper, _checked(pack.note, path), held)


def _checked(note: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns name and labels of a file as far as they can be used; a stranger wrote them."""
    try:
        json.dumps(note)
        found = {key: note[key] for key in _LABELS if key in note}
        if "name" in found:
            check_name(found["name"])
        check_labels(found.get("message", ""), tuple(found.get("tags", ())))
        for key in ("source", "licence"):
            check_labels(found.get(key, ""), ())
        check_metrics(found.get("metrics", {}))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptMemory(f"{path}: its labels can't be used: {error}") from error
    return found
