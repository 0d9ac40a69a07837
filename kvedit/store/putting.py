"""Putting: how a memory gets ready to be written, as its bytes or as its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.digest import digest_bytes
from kvedit.store.codecs import LOSSY, check_against_edit
from kvedit.store.draft import Draft, Prepared, prepare, put_event
from kvedit.store.dtypes import dtype_name
from kvedit.store.opened import OpenStore
from kvedit.store.recipes import RECIPE, Recipe, encode_recipe
from kvedit.store.records import Details, Record

__all__ = ["Putting"]


class Putting(OpenStore):
    """What a store does for a put before, around and after the write."""

    def _put(self, drafts: Sequence[Draft]) -> list[Record]:
        self._check_readable()
        heads = [self._shelf.index.entry(draft.name) for draft in drafts]
        seen = {d.name: h.record if h else "" for d, h in zip(drafts, heads, strict=True)}
        puts = [self._prepared(draft) for draft in drafts]
        records = self._commit(puts, seen)
        for put, record in zip(puts, records, strict=True):
            self._keep(record, put.memory)
        return records

    def _check_readable(self) -> None:
        """Refuses puts that this store itself would not read back."""
        signer, trusted = self._shelf.signer, self._shelf.trusted
        if trusted and (signer is None or signer.public not in {key.lower() for key in trusted}):
            raise InvalidArgument(
                "this store reads only what its trusted_keys signed: open it with the signer of "
                "one of them to put something"
            )
        self._check_key()

    def _commit(self, puts: Sequence[Prepared], seen: Mapping[str, str]) -> list[Record]:
        return self._writer.put(puts, seen)

    def _prepared(self, draft: Draft) -> Prepared:
        if draft.codec == RECIPE:
            return self._prepared_recipe(draft)
        put = prepare(draft, self._shelf.signer, self._shelf.namespace)
        if draft.codec in LOSSY and put.error is not None:
            before = self._parent(draft.memory)
            check_against_edit(put.error, before, draft.memory, draft.force)
        return put

    def _parent(self, memory: KVMemory) -> KVMemory | None:
        """Returns the stored memory that the last edit was made of, or None."""
        head = memory.lineage.head
        for node in head.inputs if head else ():
            for record in self._stored(node):
                return self._read(record)
        return None

    def _prepared_recipe(self, draft: Draft) -> Prepared:
        memory = draft.memory
        memory.check_unmodified()
        base = self._recipe_base(memory)
        data = encode_recipe(memory, base.record)
        record = digest_bytes(data)
        event = put_event(draft.name, draft.labels, record, memory, memory.cut())
        event |= {"content": memory.digest, "codec": RECIPE, "base": base.record}
        if self._shelf.signer is not None:
            signature = self._shelf.signer.sign(record, self._shelf.namespace)
            event["signature"] = signature.to_json()
        return Prepared(draft, memory, [], {}, data, event)

    def _recipe_base(self, memory: KVMemory) -> Record:
        """Returns what the recipe starts from, once it has been seen to give the same memory."""
        if self._replay is None:
            raise InvalidArgument(
                "a recipe is put once it was seen to work: open the store with "
                "Store(..., replay=kvedit.rebuild)"
            )
        bases: list[Record] = []

        dtype = dtype_name(memory.dtype)

        def fetch(node: str) -> KVMemory:
            # A cast leaves no step: of several memories the one of our dtype is more likely.
            for record in sorted(self._stored(node), key=lambda found: found.dtype != dtype):
                bases.append(record)
                return self._read(record)
            raise self._finder.unknown(node)

        again = self._replay(memory.lineage, fetch)
        if again.digest != memory.digest or len({base.record for base in bases}) != 1:
            raise InvalidArgument(
                "the steps of this memory do not give it again, bit by bit, from one stored "
                "memory: put its bytes (recipe=False)"
            )
        return bases[0]

    def _show_recipe(self, record: Record) -> Details:
        recipe = Recipe.parse(self._finder.paper(record.record), record.record)
        steps = tuple(recipe.lineage.describe().splitlines())
        return Details(record, RECIPE, 0, 0, (), 0, 0, (), None, steps)

    def _keep(self, record: Record, memory: KVMemory) -> None:
        """Called when a memory was put."""
