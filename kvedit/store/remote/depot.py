"""Depot: a store's packs, records and refs as objects, the same bytes as in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.memory.parallel import run_all
from kvedit.store.draft import check_metrics
from kvedit.store.holding import FetchedPack
from kvedit.store.pack import HEADER_LIMIT, Extent, ManifestPlace, Pack
from kvedit.store.parsing import SHAPE_ERRORS
from kvedit.store.refs import check_labels, check_name, is_digest
from kvedit.store.remote.objects import Objects
from kvedit.store.sign import Signature

__all__ = ["Depot", "RefDocument"]

_FORMAT = "kvedit.ref.1"
_PUT = ("event", "name", "record", "content", "codec", "base", "facts", "nodes", "packs", "time")
_LABELS = ("message", "tags", "source", "licence", "metrics", "expires", "signature", "fixed")
_GRACE = timedelta(hours=24)
_GUESS = 1 << 16


@dataclass(frozen=True)
class RefDocument:
    """All versions of a name, as the remote store keeps them.

    Args:
        name: the name.
        versions: what the log says of each put, the oldest first; ``packs`` names all the packs
            that the memory needs.
        removed: whether the name is gone.
    """

    name: str
    versions: tuple[Mapping[str, Any], ...]
    removed: bool = False

    def encode(self) -> bytes:
        """Returns canonical bytes."""
        versions = [dict(version) for version in self.versions]
        return canonical_json(
            {"format": _FORMAT, "name": self.name, "versions": versions, "removed": self.removed}
        )

    @classmethod
    def parse(cls, data: bytes, where: str) -> RefDocument:
        """Returns the document that these bytes are.

        Raises:
            CorruptMemory: if they are none.
            InvalidArgument: if a newer version of the library wrote them.
        """
        try:
            found = json.loads(data)
            if found["format"] != _FORMAT:
                raise InvalidArgument(
                    f"{where} has format {found['format']!r}, this kvedit reads {_FORMAT}: use a "
                    "newer kvedit"
                )
            name = check_name(found["name"])
            removed = bool(found["removed"])
            versions = tuple(_version(version, name) for version in found["versions"])
            if not versions and not removed:
                raise CorruptMemory(f"{where} has no version")
            return cls(name, versions, removed)
        except InvalidArgument:
            raise
        except SHAPE_ERRORS as error:
            raise CorruptMemory(f"{where} does not describe a name: {error!r}") from error


def _version(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns what a version says, checked: it goes into the log, whoever wrote it.

    Raises:
        ValueError: if it is anything else than a put of that name.
    """
    if found["event"] != "put" or found["name"] != name:
        raise ValueError(f"a version is no put of {name}")
    base, expires, facts = found.get("base"), found.get("expires"), found["facts"]
    packs, nodes, tags = found["packs"], found.get("nodes", []), found["tags"]
    if not all(isinstance(some, list) for some in (packs, nodes, tags)):
        raise ValueError("packs, nodes or tags are no list")
    digests = (found["record"], found["content"], *packs, *([] if base is None else [base]))
    if not all(is_digest(digest) for digest in digests):
        raise ValueError("a version is not named by digests")
    check_labels(found["message"], tags)
    texts = [found.get(key) or "" for key in ("source", "licence", "codec")]
    check_metrics(found.get("metrics", {}))
    texts += [*nodes, facts["dtype"], facts["model"]]
    numbers = [facts[key] for key in ("bytes", "slots", "tokens", "layers")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is none")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError("a size is no number")
    for time in (found["time"], *([] if expires is None else [expires])):
        datetime.fromisoformat(time)
    if (signature := found.get("signature")) is not None:
        Signature.from_json(signature)
    return {key: value for key, value in found.items() if key in (*_PUT, *_LABELS)}


class Depot:
    """One namespace of a remote store.

    Packs are put once and never changed; what two clients put at once is the same bytes. A name
    moves by a conditional put, so that of two movers one wins and the other is told.

    Args:
        objects: the place.
        namespace: the tenant; nothing is shared with another.
    """

    def __init__(self, objects: Objects, namespace: str = "") -> None:
        self._objects = objects
        self._root = f"n{digest_bytes(namespace.encode())[:31]}" if namespace else "default"

    # Packs

    def has_pack(self, pack: str) -> int | None:
        """Returns the bytes of a pack that is there, or None."""
        return self._objects.size(self._pack(pack))

    def put_pack(self, pack: str, data: Path | bytes) -> bool:
        """Returns whether the pack was not there yet.

        Args:
            pack: its digest.
            data: its file or bytes.

        Raises:
            CorruptMemory: if something of another size is there.
            TierUnavailable: if the place can't be reached.
        """
        return self._objects.create(self._pack(pack), data)

    def read_pack(self, pack: str) -> memoryview | None:
        """Returns all bytes of a pack, or None; large ones in ranges side by side."""
        size = self.has_pack(pack)
        return None if size is None else self._objects.read_whole(self._pack(pack), size)

    def read_header(self, pack: str) -> bytes | None:
        """Returns length and header of a pack, or None.

        Raises:
            CorruptMemory: if they are not those of that pack.
        """
        size = self.has_pack(pack)
        if size is None:
            return None
        head = self._objects.read(self._pack(pack), 0, min(_GUESS, size))
        length = 8 + int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > min(size, HEADER_LIMIT):
            raise CorruptMemory(f"pack {pack} is cut off or its header is damaged")
        if length > len(head):
            head += self._objects.read(self._pack(pack), len(head), length)
        Pack.parse(head[:length], pack, size, f"pack {pack}")
        return head[:length]

    def read_parts(self, pack: Pack, places: Iterable[Extent | ManifestPlace]) -> FetchedPack:
        """Returns some tensors of a pack, by ranged reads.

        Args:
            pack: what its header says.
            places: what to read.
        """
        chosen = list(places)
        ranges = [(place.offset, place.offset + place.size) for place in chosen]
        parts = self._objects.read_many(self._pack(pack.digest), ranges)
        return FetchedPack(
            pack, {place.offset: bytes(part) for place, part in zip(chosen, parts, strict=True)}
        )

    # Records and refs

    def put_record(self, record: str, event: Mapping[str, Any]) -> None:
        """Writes down which packs a record needs, so that it can be had by digest."""
        key = f"{self._root}/records/{record}.json"
        body = {"record": record, "packs": list(event["packs"]), "content": event["content"]}
        data = canonical_json(body)
        found = self._objects.get_ref(key)
        if found is None or found[0] != data:
            self._objects.set_ref(key, data, None if found is None else found[1])

    def get_record(self, record: str) -> dict[str, Any] | None:
        """Returns which packs a record needs, or None."""
        found = self._objects.get_ref(f"{self._root}/records/{record}.json")
        if found is None:
            return None
        try:
            body = json.loads(found[0])
            if body["record"] != record or not all(is_digest(pack) for pack in body["packs"]):
                raise ValueError("it is of another record")
            return dict(body)
        except SHAPE_ERRORS as error:
            raise CorruptMemory(f"record {record} of the remote store: {error!r}") from error

    def drop_record(self, record: str) -> None:
        """Forgets which packs a record needs; its packs stay until :meth:`gc`."""
        self._objects.delete([f"{self._root}/records/{record}.json"])

    def records(self) -> list[str]:
        """Returns the digests of all records, in order."""
        return sorted(self._stems("records", ".json"))

    def get_name(self, name: str) -> tuple[RefDocument, str] | None:
        """Returns what is known of a name and its etag, or None."""
        found = self._objects.get_ref(self._ref(name))
        if found is None:
            return None
        document = RefDocument.parse(found[0], f"ref of {name}")
        if document.name != name:
            raise CorruptMemory(f"the ref of {name} is that of {document.name}")
        return document, found[1]

    def set_name(self, document: RefDocument, expect: str | None) -> str:
        """Returns the new etag of a name, once it is written.

        Args:
            document: all that is known of it.
            expect: etag that it must have, or None where it must not exist.

        Raises:
            RaceLost: if somebody else was faster.
        """
        return self._objects.set_ref(self._ref(document.name), document.encode(), expect)

    def names(self) -> list[RefDocument]:
        """Returns what is known of every name, in order of the names."""
        keys = [key for key, _, _ in self._objects.list(f"{self._root}/refs")]

        def read(key: str) -> RefDocument | None:
            found = self._objects.get_ref(key)
            return None if found is None else RefDocument.parse(found[0], key)

        found = run_all(read, keys)
        return sorted((d for d in found if d is not None), key=lambda document: document.name)

    # Garbage

    def gc(self, grace: timedelta = _GRACE) -> int:
        """Returns the bytes of packs that it removed: no name and no record needs them.

        A pack younger than ``grace`` stays: somebody may be about to name it.

        Args:
            grace: age from which a pack that nobody needs goes.
        """
        needed: set[str] = set()
        live: set[str] = set()
        for document in self.names():
            for version in () if document.removed else document.versions:
                live.add(version["record"])
                needed.update(version["packs"])
        border = datetime.now(UTC) - grace
        listing = list(self._objects.list(f"{self._root}/records"))
        for key, _, changed in listing:
            record = key.rsplit("/", 1)[-1].removesuffix(".json")
            if record not in live and changed > border:
                needed.update((self.get_record(record) or {}).get("packs", ()))
        dead = [
            key
            for key, _, changed in listing
            if key.rsplit("/", 1)[-1].removesuffix(".json") not in live and changed <= border
        ]
        freed = 0
        for key, size, changed in list(self._objects.list(f"{self._root}/packs")):
            if key.rsplit("/", 1)[-1].split(".")[0] not in needed and changed <= border:
                dead.append(key)
                freed += size
        self._objects.delete(dead)
        return freed

    def pack_bytes(self) -> int:
        """Returns the bytes of all packs."""
        return sum(size for _, size, _ in self._objects.list(f"{self._root}/packs"))

    # Keys: of digests only

    def _pack(self, pack: str) -> str:
        if not is_digest(pack):
            raise CorruptMemory(f"{pack!r} is no digest; it can't name an object")
        return f"{self._root}/packs/{pack}.safetensors"

    def _ref(self, name: str) -> str:
        return f"{self._root}/refs/{digest_bytes(check_name(name).encode())}.json"

    def _stems(self, folder: str, suffix: str) -> Iterator[str]:
        for key, _, _ in self._objects.list(f"{self._root}/{folder}"):
            stem = key.rsplit("/", 1)[-1].removesuffix(suffix)
            if is_digest(stem):
                yield stem
