"""Naming: what is done to names: branches, tags, rollbacks, notes, pins, removal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from kvedit.errors import InvalidArgument, RaceLost
from kvedit.store.catalogue import now
from kvedit.store.draft import (
    Labels,
    check_metrics,
)
from kvedit.store.putting import Putting
from kvedit.store.records import Record
from kvedit.store.refs import check_labels, check_name

__all__ = ["Naming"]


class Naming(Putting):
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
        made = dataclasses.replace(found, **vars(labels))
        self._moved(made, fresh=False)
        return made

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
            made = self._shelf.index.versions(name)[0]
        self._moved(made, fresh=True)
        return made

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

    def _moved(self, record: Record, fresh: bool) -> None:
        """Called when a name has a version, made just now, or other labels."""

    def _removed(self, name: str) -> None:
        """Called when a name is gone."""
