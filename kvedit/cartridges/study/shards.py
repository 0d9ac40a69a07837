"""Shards: the files of a set of samples, written whole or not at all, and checked when read.

A folder holds ``study.json``, which says what the samples depend on, and one parquet file for
each stretch of attempts. A shard's name is its stretch and the digest of its bytes, so a file that
was torn, flipped, swapped or left out is seen. Every stretch begins where another ended.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvedit.cartridges.study.rows import Row, pyarrow, table_of
from kvedit.errors import CorruptMemory, NotFound
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["MANIFEST", "Shard", "Shards", "manifest_of", "publish", "write_shard"]

MANIFEST = "study.json"
TEMPORARY = ".tmp-"
_FORMAT = {"format": "kvedit-study", "version": 1}
_NAME = re.compile(r"(\d{9,})-(\d{9,})-([0-9a-f]{32})\.parquet")
_HELD_BYTES = 1 << 28


@dataclass(frozen=True)
class Shard:
    """One file.

    Args:
        path: where it is.
        first: number of the first attempt that it covers.
        stop: one past the last.
        digest: first 32 characters of the BLAKE3 of its bytes.
        rows: samples in it.
        dropped: reason to number of attempts that gave no sample.
    """

    path: Path
    first: int
    stop: int
    digest: str
    rows: int
    dropped: Mapping[str, int]


class Shards:
    """The shards of a folder, in order; their tables are read when they are needed.

    Args:
        folder: the folder.

    Raises:
        NotFound: if it is no set of samples.
        CorruptMemory: if the manifest or a shard can't be read, or a shard is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        """Reads the manifest and the shards' ends."""
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.identity = digest_bytes(canonical_json(self.manifest))
        self.files: list[Shard] = []
        self._tables: OrderedDict[int, Any] = OrderedDict()
        for path in sorted(self.folder.glob("*.parquet")):
            self.add(_read_shard(path, self.identity))

    @property
    def k(self) -> int:
        """Width of the teacher's columns."""
        return int(self.manifest["k"])

    @property
    def facts(self) -> dict[str, Any]:
        """What the samples depend on."""
        return dict(self.manifest["facts"])

    @property
    def attempts(self) -> int:
        """Attempts so far."""
        return self.files[-1].stop if self.files else 0

    @property
    def dropped(self) -> Counter[str]:
        """Reason to number of attempts that gave no sample."""
        total: Counter[str] = Counter()
        for shard in self.files:
            total.update(shard.dropped)
        return total

    def add(self, shard: Shard) -> None:
        """Adds the shard that follows.

        Raises:
            CorruptMemory: if one between is missing, or two overlap.
        """
        if shard.first != self.attempts:
            raise CorruptMemory(
                f"{shard.path}: expected a shard that begins with attempt {self.attempts}, found "
                f"one of attempts {shard.first} to {shard.stop - 1}; restore the missing file, or "
                "remove all shards from there on and resume the study"
            )
        self.files.append(shard)

    def table(self, number: int) -> Any:
        """Returns a shard's table, its bytes checked when it is first read.

        Raises:
            CorruptMemory: if its bytes are not those that were written.
        """
        if number not in self._tables:
            self._tables[number] = _read_table(self.files[number])
        self._tables.move_to_end(number)
        while len(self._tables) > 1 and sum(t.nbytes for t in self._tables.values()) > _HELD_BYTES:
            self._tables.popitem(last=False)
        return self._tables[number]


def manifest_of(facts: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Returns the manifest of a set: its format, the teacher's width, what samples depend on."""
    manifest: dict[str, Any] = json.loads(canonical_json({**_FORMAT, "k": k, "facts": facts}))
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFound(f"{folder} holds no set of samples: there is no {MANIFEST}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        kind = {name: data.get(name) for name in _FORMAT}
        whole = isinstance(data.get("facts"), dict) and isinstance(data.get("k"), int)
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptMemory(f"{path} can't be read: {error}") from error
    if kind != _FORMAT or not whole or data["k"] < 1:
        raise CorruptMemory(f"{path}: expected {_FORMAT} with facts and k >= 1, found {kind}")
    manifest: dict[str, Any] = data
    return manifest


def _read_shard(path: Path, identity: str) -> Shard:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CorruptMemory(f"{path} is no shard of a set of samples: move it elsewhere")
    arrow = pyarrow()
    try:
        footer = arrow.parquet.read_metadata(path)
        head = json.loads((footer.metadata or {})[b"kvedit"])
        first, stop = int(head["first"]), int(head["stop"])
        dropped = {str(reason): int(count) for reason, count in head["dropped"].items()}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        arrow.ArrowException,
    ) as error:
        raise CorruptMemory(f"{path} is damaged, or no shard: {error}") from error
    if (first, stop) != (int(match[1]), int(match[2])) or head.get("set") != identity:
        raise CorruptMemory(f"{path} belongs to another set of samples, or was renamed")
    return Shard(path, first, stop, match[3], int(footer.num_rows), dropped)


def _read_table(shard: Shard) -> Any:
    arrow = pyarrow()
    try:
        data = shard.path.read_bytes()
    except OSError as error:
        raise CorruptMemory(f"{shard.path} can't be read: {error}") from error
    found = digest_bytes(data)[: len(shard.digest)]
    if found != shard.digest:
        raise CorruptMemory(
            f"{shard.path} is damaged: expected bytes of digest {shard.digest}, found {found}; "
            "restore it, or remove it and all later shards and resume the study"
        )
    return arrow.parquet.read_table(arrow.BufferReader(data))


def write_shard(
    shards: Shards, stop: int, rows: Sequence[Row], dropped: Mapping[str, int]
) -> Shard:
    """Writes the next shard and adds it.

    Args:
        shards: the shards so far.
        stop: one past the last attempt that it covers.
        rows: samples.
        dropped: reason to number of attempts without one.

    Returns:
        The shard.
    """
    arrow = pyarrow()
    first = shards.attempts
    head = {"first": first, "stop": stop, "dropped": dict(dropped), "set": shards.identity}
    table = table_of(rows).replace_schema_metadata({b"kvedit": canonical_json(head)})
    sink = arrow.BufferOutputStream()
    arrow.parquet.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    digest = digest_bytes(data)[:32]
    path = shards.folder / f"{first:09d}-{stop:09d}-{digest}.parquet"
    publish(path, data)
    shard = Shard(path, first, stop, digest, len(rows), dict(dropped))
    shards.add(shard)
    return shard


def publish(path: Path, data: bytes) -> None:
    """Writes a file that is there whole, on the disk, or not at all."""
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name != "nt":  # Windows opens no folders
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
