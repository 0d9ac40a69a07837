"""Kill rounds: writers and readers that are killed at random, and what must be true afterwards."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import random
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvedit.errors import KVEditError
from kvedit.store import Store
from kvedit.store.layout import Durability
from kvedit.testing.victims import STEPS, VERBS, WRITERS, is_true, open_store, work

__all__ = ["PROCESSES", "Round", "kill_rounds"]

PROCESSES = 6
"""Processes that one round kills: four writers and two readers."""

_Worker = tuple[Any, int]


@dataclass
class Round:
    """What one round saw.

    Args:
        acknowledged: puts, branches and rollbacks that returned before the kill.
        checked: of these, not removed again before the kill.
        reads: memories that readers got.
        lost: acknowledged memories that are not there, or not bit-equal; removals undone.
        torn: reads that gave a memory nobody put.
        orphans: files that nobody knows, after the store was opened again.
        unhealthy: what fsck says.
        failed: errors in workers that should not be.
        jobs: how often each verb returned.
        killed: what processes did when they were killed, as ``verb/step``.
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
    killed: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.lost or self.torn or self.orphans or self.unhealthy or self.failed)


def kill_rounds(
    folder: Path, seeds: Iterable[int], durability: Durability = "process"
) -> Iterator[Round]:
    """Yields what each round saw; all run in one fresh interpreter.

    Fresh, because a process that has used a remote store can't fork: the threads of ``obstore``
    would be missing in the child, and its first call would wait for ever.

    Args:
        folder: where to work; empty.
        seeds: one for each round: of what is done, and of the moments of the kills.
        durability: of the stores.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(partial(_round, folder, durability), seeds)


def _round(folder: Path, durability: Durability, seed: int) -> Round:
    place = folder / str(seed)
    (place / "remote").mkdir(parents=True)
    found = Round()
    heard = _run(place, durability, random.Random(seed), found)
    for line in heard:
        if line["kind"] in ("torn", "failed"):
            getattr(found, line["kind"]).append(f"{line['verb']}: {line['what']}")
        found.reads += line["kind"] == "read"
        if line["kind"] == "done":
            found.jobs[line["verb"]] += 1
    # In a process of its own: this one must stay fit to fork.
    told, codes = _listen([_fork(_check, place, durability, heard)], [])
    if codes != [0]:
        found.failed.append(f"the check ended with {codes[0]}")
    for line in told:
        for name, value in line.items():
            setattr(found, name, value)
    return found


def _run(
    place: Path, durability: Durability, draw: random.Random, found: Round
) -> list[dict[str, Any]]:
    """Returns the lines that writers and readers sent until each was killed."""
    doing = mmap.mmap(-1, 2 * PROCESSES)
    workers = [
        _fork(work, place, durability, number, draw.randrange(1 << 30), doing)
        for number in range(PROCESSES)
    ]
    heard, codes = _listen(workers, [draw.uniform(0.2, 0.9) for _ in workers])
    for number, code in enumerate(codes):
        verb, step = doing[2 * number], doing[2 * number + 1]
        name = "read" if number >= WRITERS else ("begin", *VERBS)[verb]
        found.killed[f"{name}/{STEPS[step]}".rstrip("/")] += 1
        if code != -signal.SIGKILL:
            found.failed.append(f"worker {number} ended by itself with {code}")
    return heard


def _fork(target: Callable[..., None], *arguments: Any) -> _Worker:
    read, write = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=target, args=(*arguments, write))
    process.start()
    os.close(write)
    return process, read


def _listen(
    workers: list[_Worker], times: list[float]
) -> tuple[list[dict[str, Any]], list[int | None]]:
    """Returns the lines of each worker in its order, and exit codes; kills at the given times."""
    start = time.monotonic()
    data = {read: b"" for _, read in workers}
    due = sorted(zip(times, range(len(times)), strict=True))
    unfinished = set(data)
    while unfinished:
        while due and time.monotonic() - start >= due[0][0]:
            with suppress(ProcessLookupError):
                os.kill(workers[due.pop(0)[1]][0].pid, signal.SIGKILL)
        wait = max(due[0][0] - (time.monotonic() - start), 0) if due else None
        for read in select.select(unfinished, [], [], wait)[0]:
            got = os.read(read, 1 << 16)
            data[read] += got
            if not got:
                unfinished.remove(read)
                os.close(read)
    for process, _ in workers:
        process.join()
    # What comes after the last newline was being sent when its sender died.
    lines = [line for one in data.values() for line in one.split(b"\n")[:-1]]
    return [json.loads(line) for line in lines], [process.exitcode for process, _ in workers]


# What must be true afterwards


def _check(place: Path, durability: Durability, heard: list[dict[str, Any]], told: int) -> None:
    """Opens the store again and sends what is wrong."""
    store = open_store(place, durability)
    orphans = _orphans(store)
    # Names belong to one writer each: what it put after a removal began counts again.
    begun = [(at, line) for at, line in enumerate(heard) if line["kind"] == "begin"]
    removed = {line["name"]: at for at, line in begun if line["verb"] == "rm"}
    puts = [(at, line) for at, line in enumerate(heard) if line["kind"] == "put"]
    kept = [line for at, line in puts if removed.get(line["name"], -1) < at]
    wrong = {record: _wrong(store, record) for record in {line["record"] for line in kept}}
    lost = [
        f"{line['name']} v{line['version']}: {why}"
        for line in kept
        if (why := wrong[line["record"]] or _misplaced(store, line))
    ]
    unhealthy = []
    for when in ("as it is", "after the index was made again"):
        health = store.fsck()
        unhealthy += [f"{when}: {health}"] if health.problems or health.lost else []
        store.rebuild_index()
    lost += [*_undone(store, heard), *_missing_below(place, durability)]
    found = {"acknowledged": len(puts), "checked": len(kept), "lost": lost}
    found |= {"orphans": orphans, "unhealthy": unhealthy}
    os.write(told, json.dumps(found).encode() + b"\n")


def _orphans(store: Store) -> list[str]:
    known = {pack for pack, _, _ in store._shelf.index.packs()}
    return [
        str(path)
        for folder in ("packs", "headers", "tmp")
        for path in (store.path / folder).glob("*")
        if folder == "tmp" or path.stem not in known
    ]


def _wrong(store: Store, ref: str) -> str:
    try:
        return "" if is_true(store.get(ref)) else "another memory"
    except (KVEditError, OSError) as error:
        return repr(error)


def _misplaced(store: Store, line: dict[str, Any]) -> str:
    versions = {(one.version, one.record) for one in store._shelf.index.versions(line["name"])}
    return "" if (line["version"], line["record"]) in versions else "not a version of its name"


def _undone(store: Store, heard: list[dict[str, Any]]) -> list[str]:
    """Returns names that are there although their removal returned and nothing was put since."""
    gone: set[str] = set()
    for line in heard:
        if line["kind"] == "done" and line["verb"] == "rm":
            gone.add(line["name"])
        elif line["kind"] == "begin" and line["verb"] == "put_many":
            gone.clear()
        elif line["kind"] == "begin" and line["verb"] != "rm":
            gone.discard(line["name"])
    return [f"{name} was removed and is there" for name in gone if name in store]


def _missing_below(place: Path, durability: Durability) -> list[str]:
    """Returns what the remote store names and does not have whole."""
    lost = []
    with Store(place / "clone", durability, remote=f"file://{place / 'remote'}") as clone:
        for document in clone._needed().depot.names():
            try:
                clone.pull(document.name)
                why = "" if document.removed else _wrong(clone, document.name)
            except (KVEditError, OSError) as error:
                why = repr(error)
            lost += [f"remote {document.name}: {why}"] if why else []
    return lost
