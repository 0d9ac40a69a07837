"""Catalogue: what the scheduler knows of the store: which record a reference means, its slots.

Names are looked up in the store's index for each request. What a record is does not change, so
what was found out about it is kept under its digest.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvedit.errors import KVEditError, NotFound
from kvedit.serving.outline import outline
from kvedit.serving.slots import servable_form
from kvedit.serving.vllm.matching import ServedModel, check_fits
from kvedit.store import Store
from kvedit.store.recent import Recent

__all__ = ["Catalogue", "Listed"]

_KEPT = 4096


@dataclass(frozen=True)
class Listed:
    """One version of a memory that can be served.

    Args:
        memory: record digest.
        slots: slots that it is served with.
    """

    memory: str
    slots: int


class Catalogue:
    """Looks memories up.

    Args:
        store: where they are.
        model: the model that must have made them.
    """

    def __init__(self, store: Store, model: ServedModel) -> None:
        self._store, self._model = store, model
        self._known: Recent[str, Listed | KVEditError] = Recent(_KEPT)

    def find(self, ref: object) -> Listed:
        """Returns what a name, version or digest means now.

        Raises:
            NotFound: if there is no such memory.
            KVEditError: if it can't be served by this engine.
        """
        if not isinstance(ref, str):
            raise NotFound(f"memory: expected a name, version or digest, found {ref!r}")
        digest = self._store.show(ref).record.record
        found = self._known.get(digest)
        if found is None:
            found = self._list(digest)
        if isinstance(found, KVEditError):
            raise found.with_traceback(None)  # kept: it must not grow by each request
        return found

    def _list(self, digest: str) -> Listed | KVEditError:
        memory = outline(self._store, digest)
        try:
            check_fits(memory, self._model)
            found: Listed | KVEditError = Listed(digest, servable_form(memory).slots)
        except KVEditError as error:  # what it is can't change; a store that is damaged can
            found = error
        self._known.put(digest, found)
        return found
