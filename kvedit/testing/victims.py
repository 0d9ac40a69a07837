"""Victims: the workers of a kill round, and memories whose lineage says what they must be."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import random
import signal
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvedit.errors import CapacityExceeded, NotFound, RaceLost
from kvedit.memory import KVMemory, Lineage, LineageNode
from kvedit.store import Store
from kvedit.store.layout import Durability
from kvedit.testing.tier_contract import contract_memory

__all__ = ["STEPS", "VERBS", "WRITERS", "is_true", "open_store", "work"]

WRITERS = 4
"""Workers with a lower number write, the others read."""

VERBS = ("put", "put", "edit", "put_many", "branch", "rollback", "rm", "gc", "push", "evict")
"""What writers do, each as often as the others."""

STEPS = ("", "pack", "log", "index", "remote")
"""What they may be at within a verb."""

_CAPACITY = 60_000  # of one of the writers: a few packs


@lru_cache(256)
def _memory(seed: int) -> KVMemory:
    """Returns a memory; three seeds after each other share keys and values."""
    base = contract_memory(seed // 3, slots=1 + seed // 3 % 300)
    node = LineageNode("capture", "kill", 1, json.dumps({"seed": seed}))
    lineage = Lineage((node,))
    if seed % 3 == 0:
        return dataclasses.replace(base, lineage=lineage)
    bias = torch.full((4, base.layers[0].slots), float(seed % 3))
    return base.with_layers({0: base.layers[0].add_bias(bias)}, lineage=lineage)


def is_true(memory: KVMemory) -> bool:
    """Returns whether a memory is, bit by bit, the one that its lineage says."""
    true = _memory(json.loads(memory.lineage.nodes[0].parameters)["seed"])
    return memory.digest == true.digest and all(
        kind == other and torch.equal(one.view(torch.uint8), two.view(torch.uint8))
        for index in true.layers
        for (kind, one), (other, two) in zip(
            memory.layers[index].tensors(), true.layers[index].tensors(), strict=True
        )
    )


def open_store(place: Path, durability: Durability, number: int = 0) -> Store:
    """Returns the store as one of the workers has it: with a capacity, or written through.

    Args:
        place: the folder of the round.
        durability: of the store.
        number: of the worker.
    """
    remote = f"file://{place / 'remote'}"
    capacity = _CAPACITY if number == 1 else None
    write: Any = "through" if number == 2 else "back"
    return Store(place / "store", durability, remote=remote, write=write, capacity=capacity)


def work(
    place: Path, durability: Durability, number: int, seed: int, doing: mmap.mmap, told: int
) -> None:
    """Writes or reads until it is killed, and sends a line before and after everything it does.

    Args:
        place: the folder of the round.
        durability: of the store.
        number: of the worker.
        seed: of what it does.
        doing: gets the numbers of verb and step, two bytes for each worker.
        told: where the lines go.
    """
    draw = random.Random(seed)
    store = open_store(place, durability, number)
    writes = number < WRITERS
    # Half of the writers die at the border of a step, where no clock would hit.
    _watch(store, doing, 2 * number + 1, draw.randrange(250) if writes and seed % 2 else -1)
    step = 0
    while True:
        step += 1
        verb = draw.randrange(len(VERBS))
        doing[2 * number] = verb + 1
        name = VERBS[verb] if writes else "read"

        def tell(kind: str, verb: str = name, **what: Any) -> None:
            os.write(told, json.dumps({"kind": kind, "verb": verb, **what}).encode() + b"\n")

        try:
            if writes:
                _write(store, name, (number * 1000 + step) * 10, draw, number, tell)
            else:
                memory = store.get(draw.choice(store.names() or ["none"]))
                tell("read" if is_true(memory) else "torn", what=memory.digest)
        except (NotFound, RaceLost, CapacityExceeded):
            continue
        except Exception as error:
            tell("failed", what=repr(error)[:2000])


def _watch(store: Store, doing: mmap.mmap, place: int, fuse: int) -> None:
    """Notes at which step a store is, and dies at the border of the ``fuse``-th one."""
    left = [fuse]

    def burn() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, method: str, step: str) -> None:
        real = getattr(owner, method)

        def watched(*arguments: Any, **how: Any) -> Any:
            before, doing[place] = doing[place], STEPS.index(step)
            burn()
            try:
                return real(*arguments, **how)
            finally:
                burn()
                doing[place] = before

        vars(owner)[method] = watched

    shelf, depot = store._shelf, store._needed().depot
    for owner, method, step in (
        (shelf.layout, "publish", "pack"),
        (shelf.journal, "append", "log"),
        (shelf.index, "catch_up", "index"),
        (depot, "put_pack", "remote"),
        (depot, "set_name", "remote"),
    ):
        wrap(owner, method, step)


def _write(
    store: Store, verb: str, seed: int, draw: random.Random, number: int, tell: Callable[..., None]
) -> None:
    own = [f"{number}/{i}" for i in range(4)]
    name = draw.choice(own if verb == "rm" else [*own, "shared"])
    tell("begin", name=name)
    records = []
    if verb in ("put", "edit"):
        memory = _memory(seed if verb == "put" else seed - 10 + draw.randrange(3))
        records = [store.put(memory, name, message=str(seed), force=name != "shared")]
    elif verb == "put_many":
        records = store.put_many({f"{number}/{i}": _memory(seed + i) for i in range(3)})
    elif verb == "branch":
        records = [store.branch(name, f"{number}/b{seed}")]
    elif verb == "rollback":
        records = [store.rollback(name)]
    elif verb == "rm":
        store.rm(name)
    elif verb == "gc":
        store.gc(waste=draw.choice([0.0, 0.25]))
    elif verb == "push":
        store.push(name, force=draw.random() < 0.5)
    elif verb == "evict":
        store.evict(draw.choice([1, 10_000, 1 << 20]))
    for record in records:
        tell("put", name=record.name, version=record.version, record=record.record)
    tell("done", name=name)
