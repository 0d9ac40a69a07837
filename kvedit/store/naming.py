"""Naming: what is done to names: branches, tags, rollbacks, notes, pins, removal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvedit.errors import InvalidArgument, RaceLost
from kvedit.memory import KVMemory
from kvedit.memory.digest import digest_bytes
from kvedit.store.codecs import LOSSY, check_against_edit
from kvedit.store.draft import (
    Draft,
    Labels,
    Prepared,
    check_metrics,
    facts,
    prepare,
    step_ids,
)
from kvedit.store.dtypes import dtype_name
from kvedit.store.index import now
from kvedit.store.opened import OpenStore
from kvedit.store.recipes import RECIPE, Recipe, encode_recipe
from kvedit.store.records import Details, Record
from kvedit.store.refs import check_labels, check_name

__all__ = ["Naming"]


class Naming(OpenStore):
    """The verbs of a store that change names."""

    def branch(self, ref: str, name: str, message: str = "") -> Record:
        """Returns the first version of a new name for a memory that is stored; costs no bytes.

        Args:
            ref: the memory.
            name: the new name.
            message: what to say about it.

        Raises:
            NotFound: if there is no such memory.
            RaceLost: if the name exists.
        """
        return self._point(self._resolve(ref), name, message or f"from {ref}", "")

    def tag(self, ref: str, name: str, message: str = "") -> Record:
        """Returns the only version of a new name that does not move.

        Args:
            ref: the memory.
            name: the new name.
            message: what to say about it.

        Raises:
            NotFound: if there is no such memory.
            RaceLost: if the name exists.
        """
        record = self._resolve(ref)
        return self._point(record, name, message or f"tag of {ref}", "", fixed=True)

    def rollback(self, name: str, to: str | int = 1, message: str = "") -> Record:
        """Returns the newest version of a name, which is an earlier one again.

        History stays: the rollback is a version of its own.

        Args:
            name: the name.
            to: how many versions back, or a digest of a version of this name.
            message: what to say about it.

        Raises:
            NotFound: if the name has no such version.
            RaceLost: if somebody else moved the name meanwhile.
        """
        current = self._resolve(check_name(name))
        record = self._own_version(name, to)
        said = message or f"back to v{record.version}"
        return self._point(record, name, said, current.record)

    def rm(self, name: str) -> None:
        """Removes a name with all its versions.

        They can't be reached any more, also not by digest unless another name has them. Their
        bytes stay in the folder until :meth:`gc`.

        Raises:
            NotFound: if there is no such name.
        """
        check_name(name)
        if not self._shelf.layout.exists():
            raise self._finder.unknown(name)
        with self._shelf.layout.lock:
            end = self._shelf.index.catch_up()
            if self._shelf.index.entry(name) is None:
                raise self._finder.unknown(name)
            self._writer.record({"event": "remove", "name": name}, end)
        self._removed(name)

    def annotate(
        self,
        ref: str,
        *,
        message: str | None = None,
        tags: Iterable[str] | None = None,
        source: str | None = None,
        licence: str | None = None,
        metrics: Mapping[str, float] | None = None,
        ttl: float | None = None,
    ) -> Record:
        """Returns a version with other labels; what is None stays, metrics are added.

        Args:
            ref: ``"name"`` or ``"name@{k}"``.
            message: what to say about it.
            tags: all of its tags.
            source: where the text came from.
            licence: of the text.
            metrics: evaluation results to add or replace.
            ttl: seconds from now until it goes by itself; 0 for never.

        Raises:
            NotFound: if there is no such memory.
            InvalidArgument: if a label can't be written down.
        """
        self._resolve(ref)  # before the lock, which would make the folder of a store that is none
        with self._shelf.layout.lock:
            end = self._shelf.index.catch_up()
            found = self._resolve(ref)
            labels = Labels.of(
                found.message if message is None else message,
                found.tags if tags is None else tags,
                found.source if source is None else source,
                found.licence if licence is None else licence,
                {**found.metrics, **check_metrics(metrics or {})},
                ttl or None,
            )
            if ttl is None:
                labels = dataclasses.replace(labels, expires=found.expires)
            event = {"event": "note", "name": found.name, "version": found.version}
            self._writer.record({**event, **labels.to_json()}, end)
            # Not asked of the index: its time may be over already.
            return dataclasses.replace(found, **vars(labels))

    def pin(self, name: str) -> None:
        """Keeps a name out of eviction and expiry.

        Raises:
            NotFound: if there is no such name.
        """
        self._pin(name, True)

    def unpin(self, name: str) -> None:
        """Takes a pin away.

        Raises:
            NotFound: if there is no such name.
        """
        self._pin(name, False)

    # Inside

    def _own_version(self, name: str, to: str | int) -> Record:
        """Returns the version of this name that a number or a reference means."""
        if isinstance(to, int):
            return self._resolve(f"{name}@{{{to}}}")
        found = self._resolve(to)  # the newest of that digest may be another name's
        versions = self._shelf.index.versions(name)
        same = [version for version in versions if version.record == found.record]
        if found.content.startswith(to.lower()):
            same += [version for version in versions if version.content == found.content]
        if not same:
            raise self._finder.unknown(f"{name} at {to}")
        return same[0]

    def _pin(self, name: str, pinned: bool) -> None:
        check_name(name)
        if not self._shelf.layout.exists():
            raise self._finder.unknown(name)
        with self._shelf.layout.lock:
            end = self._shelf.index.catch_up()
            if self._shelf.index.entry(name) is None:
                raise self._finder.unknown(name)
            self._writer.record({"event": "pin", "name": name, "pinned": pinned}, end)

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
        event: dict[str, Any] = {"event": "put", "name": draft.name, **draft.labels.to_json()}
        event |= {"record": record, "content": memory.digest, "codec": RECIPE, "base": base.record}
        event |= {"facts": facts(memory, memory.cut())}
        event |= {"nodes": step_ids(memory)}
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

    def _point(
        self, record: Record, name: str, message: str, expect: str, fixed: bool = False
    ) -> Record:
        check_name(name)
        check_labels(message, ())
        with self._shelf.layout.lock:
            end = self._shelf.index.catch_up()
            current = self._shelf.index.entry(name)
            found = current.record if current else ""
            if found != expect:
                raise RaceLost(
                    f"{name} was expected at {expect or 'no version'} and is at "
                    f"{found or 'no version'}: read it again and decide"
                )
            if current is not None and current.fixed:
                raise InvalidArgument(f"{name} is a tag and stays where it is")
            if self._shelf.index.by_digest(record.record) is None:  # removed meanwhile
                raise self._finder.unknown(record.record)
            self._writer.record(self._event(record, name, message, fixed), end)
            return self._shelf.index.versions(name)[0]

    def _event(self, record: Record, name: str, message: str, fixed: bool) -> dict[str, Any]:
        """Returns a put of what is stored already."""
        known = self._shelf.index.event(record.record)
        labels = Labels(message, record.tags, record.source, record.licence, record.metrics)
        return {
            "event": "put",
            "name": name,
            **labels.to_json(),
            **known,
            "fixed": fixed,
            "packs": [],
            "time": now(),
        }

    # Later parts of a store do more here

    def _removed(self, name: str) -> None:
        """Called when a name is gone."""

    def _keep(self, record: Record, memory: KVMemory) -> None:
        """Called when a memory was put."""
