"""Memories: what a request's ``model`` stands for, and the memories that were used last."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from kvedit.errors import CapacityExceeded, InvalidArgument, NotFound
from kvedit.memory import KVMemory
from kvedit.store import Record, Store
from kvedit.store.refs import parse_ref
from kvedit.store.tiers import LiveTier

__all__ = ["Memories"]


class Memories:
    """A store, the plain model beside it, and an LRU of loaded memories by record digest.

    A name is looked up anew for every request, so one that moves is served as it is then.

    Args:
        store: the store.
        model: name of the plain model, which comes before a memory of that name.
        budget: bytes to keep; 0 keeps nothing.
    """

    def __init__(self, store: Store, model: str, budget: int) -> None:
        """Reads nothing yet."""
        self.store, self.model = store, model
        self._live = LiveTier(budget) if budget else None

    def resolve(self, name: str) -> Record | None:
        """Returns the version that a name, version or digest means; None for the plain model.

        Raises:
            NotFound: if there is none.
            InvalidArgument: if several digests begin so.
        """
        if name == self.model:
            return None
        try:
            parse_ref(name)
        except InvalidArgument as error:
            raise NotFound(f"there is no such memory: {error}") from None
        try:
            return self.store.show(name).record
        except NotFound as error:
            # Where the store lies is not the client's business.
            raise NotFound(str(error).replace(str(self.store.path), "the store")) from None

    def load(self, record: Record) -> KVMemory:
        """Returns a memory, checked when it is read from the store.

        Raises:
            NotFound: if it was removed meanwhile.
            CorruptMemory: if stored bytes are not those that were put.
        """
        live = self._live
        found = None if live is None else live.get(record.record)
        if found is not None:
            return found
        try:
            memory = self.store.get(record.record)
        except NotFound:
            raise NotFound(f"{record.name} was removed from the store") from None
        if live is not None:
            with suppress(CapacityExceeded):
                live.put(record.record, memory)
        return memory

    def listed(self) -> list[dict[str, Any]]:
        """Returns the plain model and every name of the store, as ``/v1/models`` lists them."""
        rows = [{"id": self.model, "object": "model", "created": 0, "owned_by": "kvedit"}]
        return rows + [
            _row(f"{entry.name}@{{0}}" if entry.name == self.model else entry.name, entry)
            for entry in self.store.ls()
        ]

    def described(self, name: str) -> dict[str, Any]:
        """Returns one row of the list, for any reference.

        Raises:
            NotFound: if there is none.
        """
        record = self.resolve(name)
        return self.listed()[0] if record is None else _row(name, record)

    def usage(self) -> dict[str, int]:
        """Returns how many memories are kept, and their bytes."""
        if self._live is None:
            return {"memories": 0, "bytes": 0}
        found = self._live.usage()
        return {"memories": found.records, "bytes": found.bytes}

    def close(self) -> None:
        """Lets go of what is kept; the store stays open."""
        if self._live is not None:
            self._live.close()


def _row(name: str, record: Record) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(record.created.timestamp()),
        "owned_by": record.model,
        "memory": {
            "record": record.record,
            "content": record.content,
            "version": record.version,
            "slots": record.slots,
            "bytes": record.bytes,
        },
    }
