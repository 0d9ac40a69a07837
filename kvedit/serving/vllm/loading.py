"""Loading: from the store to keys and values as pages take them, the last few kept."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from einops import rearrange

from kvedit.errors import InvalidArgument
from kvedit.serving.slots import served
from kvedit.serving.vllm.matching import ServedModel, check_fits
from kvedit.store import Store
from kvedit.store.reader import Verify

__all__ = ["Loaded", "Loader"]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A memory in memory of its own: nothing that happens to the store's files reaches it.

    Args:
        keys: per layer ``[slot, head, dim]``, in the model's dtype.
        values: per layer ``[slot, head, dim]``.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def slots(self) -> int:
        """Slots per layer."""
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class Loader:
    """Loads memories by record digest.

    Args:
        store: where they are.
        model: the model that must have made them.
        verify: what the store checks: ``"full"``, ``"deep"`` or ``"fast"``.
        capacity: bytes of loaded memories to keep.

    Raises:
        InvalidArgument: if the store is to check nothing.
    """

    def __init__(
        self, store: Store, model: ServedModel, verify: Verify = "full", capacity: int = 1 << 30
    ) -> None:
        if verify not in ("full", "deep", "fast"):
            raise InvalidArgument(
                f"verify: expected full, deep or fast, found {verify!r}; an engine serves nothing "
                "unchecked"
            )
        self._store, self._model, self._verify, self._capacity = store, model, verify, capacity
        self._kept: OrderedDict[str, Loaded] = OrderedDict()

    def load(self, digest: str) -> Loaded:
        """Returns a memory, every byte of it checked before.

        Raises:
            KVEditError: if it is not there, damaged, of another model, or can't be served.
        """
        found = self._kept.get(digest)
        if found is None:
            found = self._read(digest)
            self._kept[digest] = found
        self._kept.move_to_end(digest)
        while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > (
            self._capacity
        ):
            self._kept.popitem(last=False)
        return found

    def _read(self, digest: str) -> Loaded:
        memory = self._store.get(digest, verify=self._verify)
        check_fits(memory, self._model)
        plain = served(memory, self._model.dtype, digest=digest)
        return Loaded(tuple(map(_paged, plain.keys)), tuple(map(_paged, plain.values)))


def _paged(tensor: torch.Tensor) -> torch.Tensor:
    # The store may hand out views of mapped files; a file that is cut later would take the engine.
    return rearrange(tensor, "head slot dim -> slot head dim").clone(
        memory_format=torch.contiguous_format
    )
