"""Tiering: live memories above the folder, a remote store and a pool beside and below it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from kvedit.errors import (
    InvalidArgument,
    KVEditError,
    NotFound,
    RaceLost,
)
from kvedit.memory import KVMemory
from kvedit.store.draft import Draft, Prepared
from kvedit.store.layout import Durability
from kvedit.store.lifting import FAILURES, Lifting
from kvedit.store.opened import Rebuild
from kvedit.store.queue import PutQueue
from kvedit.store.records import Record
from kvedit.store.refs import check_name, parse_ref
from kvedit.store.room import Room, parse_bytes
from kvedit.store.sign import Signer
from kvedit.store.stats import StoreStats
from kvedit.store.tiers import Pool
from kvedit.store.urls import cache_folder, is_url

__all__ = ["Tiering"]


class Tiering(Lifting):
    """The verbs of a store that move memories between tiers; the arguments are ``Store``'s."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        durability: Durability = "full",
        *,
        namespace: str = "",
        key: bytes | str | Path | None = None,
        signer: Signer | None = None,
        trusted_keys: Collection[str] = (),
        replay: Rebuild | None = None,
        capacity: int | str | None = None,
        ram: int | str | None = None,
        device: tuple[torch.device | str, int | str] | None = None,
        remote: str | None = None,
        remote_options: Mapping[str, Any] | None = None,
        pool: Pool | None = None,
        write: Literal["through", "back"] = "through",
        queue: int | str = "1GiB",
    ) -> None:
        self._follows = is_url(path)
        if self._follows and remote is not None:
            raise InvalidArgument(f"{path} is remote already: name a folder to use remote=")
        if write not in ("through", "back"):
            raise InvalidArgument(f"write must be 'through' or 'back', found {write!r}")
        url = os.fspath(path) if self._follows else remote
        folder = cache_folder(os.fspath(path)) if self._follows else path
        super().__init__(folder, durability, namespace, key, signer, trusted_keys, replay)
        self._write = write
        self._queue = PutQueue(parse_bytes(queue))
        self._sync = self._connected(url, dict(remote_options or {}))
        self._room = Room(
            self._shelf,
            self._finder,
            self._sync.depot if self._sync else None,
            None if capacity is None else parse_bytes(capacity),
        )
        self._shelf.make_room = self._room.make
        self._finder.note_use = capacity is not None
        if self._sync is not None:
            self._finder.below = self._sync.below
        self._add_tiers(ram, device, pool)

    # What users call

    def put_async(
        self, memory: KVMemory, name: str, message: str = "", tags: Iterable[str] = (), **how: Any
    ) -> Future[Record]:
        """Returns at once; the future has the record when the memory is as safe as by ``put``.

        Where more bytes wait than ``queue`` says, it waits until there is room.

        Args:
            memory: the memory.
            name: where to put it.
            message: what to say about it.
            tags: its labels.
            **how: what ``Store.put`` takes beside.
        """
        put: Callable[..., Record] = self.put  # type: ignore[attr-defined]
        return self._queue.add(lambda: put(memory, name, message, tags, **how), memory.nbytes)

    def flush(self) -> None:
        """Waits for asynchronous puts, and pushes what the remote store does not have yet.

        Raises:
            KVEditError: of the first put or push that failed; the others were tried as well.
        """
        errors = self._queue.wait()
        if self._sync is not None:
            for name in self._shelf.index.unpushed():
                try:
                    self._sync.push(name)
                except (KVEditError, OSError) as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def prefetch(self, ref: str) -> Future[None]:
        """Returns at once; brings a memory up, to RAM where there is a budget, in the background.

        Args:
            ref: the memory.
        """
        get: Callable[[str], KVMemory] = self.get  # type: ignore[attr-defined]

        def bring() -> None:
            get(ref)

        return self._queue.add(bring, 0)

    def push(self, names: str | Iterable[str] | None = None, force: bool = False) -> int:
        """Returns how many packs it sent so that the remote store has these names.

        Args:
            names: which; None for all, removed ones as well.
            force: put our newest versions on top of histories that went another way.

        Raises:
            InvalidArgument: if there is no remote store.
            RaceLost: if a remote name went another way.
            TierUnavailable: if the remote store can't be reached; repeat it, it goes on.
        """
        sync = self._needed()
        if names is None:
            names = sorted({*self._shelf.index.names(), *self._shelf.index.unpushed()})
        chosen = [names] if isinstance(names, str) else list(names)
        return sum(sync.push(check_name(name), force) for name in chosen)

    def pull(
        self, names: str | Iterable[str] | None = None, eager: bool = True, force: bool = False
    ) -> list[str]:
        """Returns the names of which the folder learnt something from the remote store.

        Args:
            names: which; None for all.
            eager: bring all bytes now, or when they are read.
            force: put their newest versions on top of histories that went another way.

        Raises:
            InvalidArgument: if there is no remote store.
            NotFound: if it has no such name.
            RaceLost: if one of our names went another way.
            TierUnavailable: if the remote store can't be reached.
        """
        sync = self._needed()
        if names is None:
            learnt: list[str] = sync.pull_all(eager)
            return learnt
        chosen = [names] if isinstance(names, str) else list(names)
        return [name for name in chosen if sync.pull(check_name(name), eager, force)]

    def sync(self) -> tuple[int, list[str]]:
        """Returns packs sent and names learnt, once it has pulled and pushed everything.

        Raises:
            InvalidArgument: if there is no remote store.
            RaceLost: if a name went two ways.
            TierUnavailable: if the remote store can't be reached.
        """
        learnt = self.pull()
        return self.push(), learnt

    def evict(self, size: int | str) -> int:
        """Returns the bytes of packs that it let go from the folder; the tier below has them.

        Args:
            size: how many bytes to let go, the least recently used first.
        """
        return self._room.evict(parse_bytes(size))

    def stats(self) -> StoreStats:
        """Returns counters, and what every tier holds."""
        packs = self._shelf.index.packs()
        local = [max(self._shelf.layout.pack_size(name), 0) for name, _, _ in packs]
        tiers = {tier.name: tier.usage() for tier in self._live}
        names, _ = self._shelf.index.totals()
        return StoreStats(
            names, len(packs), sum(size for _, size, _ in packs), sum(local), tiers, self.counters
        )

    def close(self) -> None:
        """Waits for asynchronous work and closes everything; what failed is raised."""
        errors = self._queue.close()
        for tier in self._live:
            tier.close()
        super().close()
        if errors:
            raise errors[0]

    # Reading

    def _ask(self, ref: object) -> None:
        if self._follows:
            name = parse_ref(ref).name
            if name:
                self._refresh([name])
            elif self._finder.find(ref) is None:
                self._learn()  # a digest: any name may have it

    def _learn(self) -> None:
        if self._follows:
            self._needed().pull_all(eager=False)

    # Writing

    def _put(self, drafts: Sequence[Draft]) -> list[Record]:
        if self._follows:
            self._refresh(draft.name for draft in drafts)
        return super()._put(drafts)

    def _commit(self, puts: Sequence[Prepared], seen: Mapping[str, str]) -> list[Record]:
        records = super()._commit(puts, seen)
        for record in records:
            self._moved(record, fresh=record.record != seen.get(record.name))
        return records

    def _moved(self, record: Record, fresh: bool) -> None:
        if self._sync is not None and (self._follows or self._write == "through"):
            self._push_through(record, fresh)

    def _push_through(self, record: Record, fresh: bool) -> None:
        sync = self._needed()
        try:
            sync.push(record.name)
        except RaceLost:
            self._take_back(record, fresh)
            raise
        except FAILURES as error:
            if self._follows:
                self._take_back(record, fresh)
                raise
            self._warn("remote", error)

    def _take_back(self, record: Record, fresh: bool) -> None:
        if not fresh:
            return  # an earlier put was acknowledged with that version
        with self._shelf.layout.lock:
            event = {"event": "drop", "name": record.name, "versions": [record.version]}
            self._writer.record(event)

    def _removed(self, name: str) -> None:
        if self._follows:
            self._needed().push(name)  # until then it is not removed
        elif self._sync is not None and self._write == "through":
            sync = self._sync
            self._degrading("remote", lambda: sync.push(name), 0)

    def _refresh(self, names: Iterable[str]) -> None:
        """Learns where names point in the remote store that this one follows."""
        for name in names:
            with suppress(NotFound):
                self._needed().pull(name, eager=False)

    # Inside

    def _connected(self, url: str | None, options: dict[str, Any]) -> Any:
        if url is None:
            return None
        from kvedit.store.remote.depot import Depot
        from kvedit.store.remote.objects import Objects
        from kvedit.store.remote.sync import Sync

        depot = Depot(Objects.open(url, **options), self._shelf.namespace)
        return Sync(self._shelf, self._finder, self._writer, depot)

    def _needed(self) -> Any:
        if self._sync is None:
            raise InvalidArgument(
                "this store has no remote store: open it with Store(folder, remote='s3://…')"
            )
        return self._sync
