"""bench store: what puts and gets cost beside plain safetensors, in pairs, tier by tier."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvedit.memory import KVMemory, LayerKV, LayerSpec, Lineage, LineageNode, ModelSpec, RopeSpec
from kvedit.memory.spec import Fingerprint
from kvedit.store import Store

__all__ = ["Row", "StoreReport", "bench_many", "bench_store", "synthetic"]

LAYERS, HEADS, DIM = 30, 3, 64
_BATCH = 2000


@dataclass(frozen=True)
class Row:
    """One operation.

    Args:
        name: what was done.
        p50: milliseconds, median.
        p99: milliseconds, 99th percentile; the slowest of fewer than 100.
        megabytes: MB of tensors per second at the median; 0 where nothing is read or written.
        verified: share of the bytes that was checked.
        plain: milliseconds of plain safetensors beside it, median; 0 without a counterpart.
        ratio: median over pairs of plain time / store time; 0 without a counterpart.
        spread: smallest and largest of these.
    """

    name: str
    p50: float
    p99: float
    megabytes: float = 0.0
    verified: float = 0.0
    plain: float = 0.0
    ratio: float = 0.0
    spread: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class StoreReport:
    """What a run found.

    Args:
        title: sizes and pairs.
        rows: the operations.
        notes: lines below the table.
    """

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A Markdown table."""
        lines = [
            self.title,
            "",
            "| operation | p50 ms | p99 ms | ops/s | MB/s | checked | plain ms | ratio (min–max) |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            low, high = row.spread
            ratio = f"{row.ratio:.2f} ({low:.2f}–{high:.2f})" if row.ratio else ""
            plain = f"{row.plain:.1f}" if row.plain else ""
            speed = f"{row.megabytes:.0f}" if row.megabytes else ""
            lines.append(
                f"| {row.name} | {row.p50:.2f} | {row.p99:.2f} | {1e3 / row.p50:.1f} | {speed} | "
                f"{row.verified:.0%} | {plain} | {ratio} |"
            )
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def synthetic(slots: int, seed: int = 0, layers: int = LAYERS, dim: int = DIM) -> KVMemory:
    """Returns random keys and values in float32, in the shape of SmolLM2-135M.

    Args:
        slots: of each layer.
        seed: of the numbers.
        layers: how many.
        dim: of keys and values.
    """
    draw = torch.Generator().manual_seed(seed)
    rope = RopeSpec("default", tuple(1e4 ** (-i / dim) for i in range(dim // 2)), 1.0, "half")
    spec = LayerSpec("full", 9, HEADS, dim, dim, dim**-0.5, rope=rope)
    prints = Fingerprint(config="c" * 64, weights="w" * 64, tokenizer="t" * 64)
    model = ModelSpec("llama", "synthetic", (spec,) * layers, "rope", 1 << 30, 1000, prints)
    slot, nowhere = torch.arange(slots), torch.full((slots,), -1)
    shape = (HEADS, slots, dim)
    content = {
        index: LayerKV(
            torch.randn(shape, generator=draw), torch.randn(shape, generator=draw), slot, nowhere
        )
        for index in range(layers)
    }
    node = LineageNode("capture", "synthetic", 1, f'{{"seed":{seed}}}')
    return KVMemory(content, model, slots, lineage=Lineage((node,)))


def bench_store(size: int, pairs: int, model: str | None = None) -> StoreReport:
    """Returns times of a store beside plain safetensors of the same bytes.

    Pairs alternate. "Then every byte" means that each side also sums all keys and values; without
    it, the check is what has read every byte on the store's side.

    Args:
        size: bytes of keys and values.
        pairs: pairs per row.
        model: a model whose prefill is compared with loading, or None.
    """
    memory = synthetic(max(size // (LAYERS * 2 * HEADS * DIM * 4), 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = tuple(_rows(folder, memory, pairs))
        notes = () if model is None else (_break_even(folder, memory, rows, model),)
    title = (
        f"{memory.nbytes / 1e6:.0f} MB of tensors ({memory.slots} slots), {pairs} pairs, "
        f"{torch.get_num_threads()} torch threads"
    )
    return StoreReport(title, rows, notes)


def bench_many(count: int) -> StoreReport:
    """Returns what a store of many tiny memories takes; nothing is synced.

    Args:
        count: how many memories.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "many"
        rows = []
        with Store(folder, "none") as store:
            for start in range(0, count, _BATCH):
                stop = min(start + _BATCH, count)
                made = {f"n/{n:06d}": _tiny(n) for n in range(start, stop)}
                store.put_many(made)
                if start == 0 or stop == count:
                    fresh = iter([_tiny(count + start + n) for n in range(30)])
                    put = partial(_put_next, store, fresh)
                    rows.append(_row(f"put, {stop} there", _times(put, 30)))
        rows.append(_row("open", _times(lambda: len(Store(folder, "none").ls(limit=1)), 5)))
        with Store(folder, "none") as store:
            some = f"n/{count // 2:06d}"
            record = store.log(some)[0].record
            for title, action in (
                ("look a name up", lambda: store.log(some)),
                ("look a digest up", lambda: record[:16] in store),
                ("ls, a page of 50", lambda: store.ls(limit=50, after="n/001")),
                ("get a tiny memory", lambda: store.get(some)),
            ):
                rows.append(_row(title, _times(action, 100)))
    return StoreReport(f"{count} memories of one layer and two slots", tuple(rows))


def _put_next(store: Store, memories: Iterator[KVMemory]) -> None:
    store.put(next(memories), "probe")


def _tiny(seed: int) -> KVMemory:
    return synthetic(2, seed, layers=1, dim=2)


def _rows(folder: Path, memory: KVMemory, pairs: int) -> Iterator[Row]:
    megabytes = memory.nbytes / 1e6
    plain = folder / "plain.safetensors"
    tensors = {
        f"{index}.{kind}": getattr(layer, kind)
        for index, layer in memory.layers.items()
        for kind in ("keys", "values")
    }

    def put() -> None:
        shutil.rmtree(folder / "put", ignore_errors=True)  # as the other side unlinks its file
        with Store(folder / "put") as store:
            store.put(memory, "m")

    save = _saver(tensors, plain)
    save()
    yield _pair("put, durable", save, put, pairs, megabytes)
    store = Store(folder / "s")
    store.put(memory, "m")
    live = Store(folder / "s", ram=2 * memory.nbytes)

    def load() -> None:
        _touch(load_file(plain))

    for verify in ("off", "full", "deep"):
        share = 0.0 if verify == "off" else 1.0

        def get(verify: Any = verify) -> KVMemory:
            return store.get("m", verify=verify)

        get()  # from now on warm
        if share:
            yield _pair(f"get {verify}", load, get, pairs, megabytes, share)

        def get_and_touch(get: Callable[[], KVMemory] = get) -> None:
            _touch(get())

        title = f"get {verify}, then every byte"
        yield _pair(title, load, get_and_touch, pairs, megabytes, share)
    live.get("m")
    title = "get from RAM, then every byte"
    yield _pair(title, load, lambda: _touch(live.get("m")), pairs, megabytes)
    one = _times(lambda: store.get("m", layers=[3]), pairs)
    yield _row("get one layer", one, megabytes / LAYERS, 1)
    yield _row("fsck", _times(store.fsck, 3), megabytes, 1)
    yield _row("gc", _times(store.gc, 3))


def _saver(tensors: dict[str, torch.Tensor], path: Path) -> Callable[[], None]:
    def save() -> None:
        path.unlink(missing_ok=True)
        save_file(tensors, path)
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)

    return save


def _touch(memory: dict[str, torch.Tensor] | KVMemory) -> None:
    if isinstance(memory, KVMemory):
        tensors = [t for layer in memory.layers.values() for t in (layer.keys, layer.values)]
    else:
        tensors = list(memory.values())
    for tensor in tensors:
        tensor.view(torch.uint8).reshape(-1).view(torch.int64).sum()


def _times(action: Callable[[], object], count: int) -> list[float]:
    """Returns milliseconds."""
    found = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def _row(name: str, times: list[float], megabytes: float = 0.0, verified: float = 0.0) -> Row:
    ordered = sorted(times)
    middle = statistics.median(ordered)
    slow = ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]
    return Row(name, middle, slow, megabytes / middle * 1e3, verified)


def _pair(
    name: str,
    theirs: Callable[[], object],
    ours: Callable[[], object],
    pairs: int,
    megabytes: float,
    verified: float = 0.0,
) -> Row:
    plain, own = [], []
    for _ in range(pairs):
        plain += _times(theirs, 1)
        own += _times(ours, 1)
    ratios = sorted(a / b for a, b in zip(plain, own, strict=True))
    row = _row(name, own, megabytes, verified)
    return Row(
        *(row.name, row.p50, row.p99, row.megabytes, verified),
        statistics.median(plain),
        statistics.median(ratios),
        (ratios[0], ratios[-1]),
    )


def _break_even(folder: Path, memory: KVMemory, rows: tuple[Row, ...], name: str) -> str:
    """Returns from how many tokens on loading is faster than the prefill of a model."""
    from kvedit.models.loading import load
    from kvedit.runs.bench.prose import prose
    from kvedit.runtime import capture

    model, tokenizer = load(name)
    text = prose(tokenizer, 512)
    count = len(tokenizer(text).input_ids)
    prefill = statistics.median(_times(lambda: capture(model, tokenizer, text), 4)[1:]) / count
    with Store(folder / "one") as store:
        store.put(synthetic(1), "m")
        store.get("m")
        fixed = statistics.median(_times(lambda: store.get("m"), 20))
    per_token = next(row.p50 for row in rows if row.name == "get deep") / memory.slots
    tokens = max(fixed / max(prefill - per_token, 1e-9), 1)
    return (
        f"Prefill of {name}, {count} tokens: {prefill:.2f} ms a token. Loading the same shape, "
        f"every block hashed: {fixed:.2f} ms and {per_token:.4f} ms a token. Loading wins from "
        f"{tokens:.0f} tokens on."
    )
