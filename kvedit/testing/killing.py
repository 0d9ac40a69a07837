"""Kill rounds: writers and readers that are killed at random, and what must be true afterwards."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvedit.errors import KVEditError, NotFound, RaceLost
from kvedit.store import Store
from kvedit.testing.tier_contract import contract_memory

__all__ = ["Round", "kill_round"]

_READERS = 2
_JOBS = ("put", "gc", "evict", "push")


@dataclass
class Round:
    """What one round saw.

    Args:
        acknowledged: puts that returned before the kill.
        checked: of these, not removed again before the kill.
        reads: memories that readers got.
        lost: acknowledged memories that are not there, or not whole.
        torn: reads that gave a memory nobody put.
        orphans: files that nobody knows, after the store was opened again.
        unhealthy: what fsck says.
        failed: errors in workers that should not be.
        jobs: how often each kind of work was done.
    """

    acknowledged: int = 0
    checked: int = 0
    reads: int = 0
    lost: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    unhealthy: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    jobs: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.lost or self.torn or self.orphans or self.unhealthy or self.failed)


def kill_round(folder: Path, seed: int, durability: Any = "process") -> Round:
    """Returns what four writers and two readers left when they were killed.

    Args:
        folder: where to work; empty.
        seed: of the moments and of what is done.
        durability: of the stores.
    """
    fork = multiprocessing.get_context("fork")
    place = folder / "store"
    (folder / "remote").mkdir(parents=True)
    _open(folder, durability).put(_memory(0), "first")
    found = Round()
    pipes, workers = [], []
    for number, job in enumerate((*_JOBS, *["read"] * _READERS)):
        mine, theirs = fork.Pipe(duplex=False)
        arguments = (folder, job, seed * 100 + number, theirs, durability)
        worker = fork.Process(target=_work, args=arguments)
        worker.start()
        theirs.close()
        pipes.append(mine)
        workers.append(worker)
    with ThreadPoolExecutor(len(pipes)) as pool:  # a full pipe would hold its writer up
        listening = [pool.submit(_drain, pipe) for pipe in pipes]
        time.sleep(random.Random(seed).uniform(0.15, 0.6))
        for worker in workers:
            if worker.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
        heard = [message for one in listening for message in one.result()]
    for worker in workers:
        worker.join()
    _check(folder, place, durability, heard, found)
    return found


def _memory(seed: int) -> Any:
    return contract_memory(seed, slots=1 + seed % 300)


def _open(folder: Path, durability: Any) -> Store:
    remote = f"file://{folder / 'remote'}"
    return Store(folder / "store", durability, remote=remote, write="back")


def _work(folder: Path, job: str, seed: int, pipe: Any, durability: Any) -> None:
    draw = random.Random(seed)
    store = _open(folder, durability)
    step = 0
    while True:
        step += 1
        try:
            if job == "read":
                name = draw.choice(store.names())
                pipe.send(("read", store.get(name).digest))
            else:
                _write(store, job, seed * 1000 + step, draw, pipe)
        except (NotFound, RaceLost):
            continue
        except (KVEditError, OSError) as error:
            pipe.send(("failed", f"{job}: {error!r}"))


def _write(store: Store, job: str, number: int, draw: random.Random, pipe: Any) -> None:
    name = f"{job}/{number % 7}"
    memory = _memory(number)
    pipe.send(("known", memory.digest))
    if draw.random() < 0.2:
        more = {f"{name}/{i}": _memory(number * 10 + i) for i in range(3)}
        for one in more.values():
            pipe.send(("known", one.digest))
        for record in store.put_many(more):
            pipe.send(("put", (record.name, record.record, record.content)))
    record = store.put(memory, name, force=True)
    pipe.send(("put", (record.name, record.record, record.content)))
    if draw.random() < 0.2:
        pipe.send(("removing", name))
        store.rm(name)
    if job == "gc" and draw.random() < 0.5:
        store.gc(waste=draw.choice([0.0, 0.25]))
    if job == "push":
        store.push(name) if name in store else None
    if job == "evict":
        store.push(name) if name in store else None
        store.evict(1 << 20)
    pipe.send(("job", job))


def _drain(pipe: Any) -> list[tuple[str, Any]]:
    heard = []
    with suppress(EOFError, OSError, ValueError, TypeError):
        while True:
            heard.append(pipe.recv())
    return heard


def _check(
    folder: Path, place: Path, durability: Any, heard: list[tuple[str, Any]], found: Round
) -> None:
    known = {_memory(0).digest} | {what for kind, what in heard if kind == "known"}
    found.failed += [what for kind, what in heard if kind == "failed"]
    found.jobs.update(what for kind, what in heard if kind == "job")
    # Names belong to one writer each: what it put after a removal began counts again.
    last = {what: place for place, (kind, what) in enumerate(heard) if kind == "removing"}
    store = _open(folder, durability)
    for place_heard, (kind, what) in enumerate(heard):
        if kind == "read":
            found.reads += 1
            if what not in known:
                found.torn.append(what)
        if kind == "put":
            name, record, content = what
            found.acknowledged += 1
            if last.get(name, -1) > place_heard:
                continue
            found.checked += 1
            try:
                if store.get(record).digest != content:
                    found.lost.append(f"{name} is another memory")
            except KVEditError as error:
                found.lost.append(f"{name}: {error}")
    packs = {pack for pack, _, _ in store._shelf.index.packs()}
    for folder_name in ("packs", "headers"):
        found.orphans += [
            str(path) for path in (place / folder_name).glob("*") if path.stem not in packs
        ]
    found.orphans += [str(path) for path in (place / "tmp").glob("*")]
    health = store.fsck()
    if not health.ok:
        found.unhealthy.append(str(health))
    store.close()
