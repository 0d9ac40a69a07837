"""Times the store beside plain safetensors, in pairs, on a memory of SmolLM2-135M's shape.

python benchmarks/store.py --size 1024 --pairs 7
python benchmarks/store.py --memories 100000
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kvedit.memory import KVMemory, LayerKV, LayerSpec, Lineage, LineageNode, ModelSpec, RopeSpec
from kvedit.memory.spec import Fingerprint
from kvedit.store import Store

LAYERS, HEADS, DIM = 30, 3, 64


def memory_of(slots: int, seed: int = 0, layers: int = LAYERS, dim: int = DIM) -> KVMemory:
    """Returns random keys and values in fp32.

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


def touch(memory: dict[str, torch.Tensor] | KVMemory) -> None:
    """Reads every byte of keys and values."""
    if isinstance(memory, KVMemory):
        tensors = [t for layer in memory.layers.values() for t in (layer.keys, layer.values)]
    else:
        tensors = list(memory.values())
    for tensor in tensors:
        tensor.view(torch.uint8).reshape(-1).view(torch.int64).sum()


def seconds(action: Callable[[], object]) -> float:
    """Returns how long an action took."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def throughput(folder: Path, size: int, pairs: int) -> None:
    """Prints medians and ratios (plain time / store time) over pairs.

    Args:
        folder: where to write.
        size: MiB of keys and values.
        pairs: how many of each.
    """
    memory = memory_of(size * (1 << 20) // (LAYERS * 2 * HEADS * DIM * 4))
    tensors = {
        f"{index}.{kind}": getattr(layer, kind)
        for index, layer in memory.layers.items()
        for kind in ("keys", "values")
    }
    plain, number = folder / "plain.safetensors", iter(range(1000))

    def save() -> None:
        plain.unlink(missing_ok=True)
        save_file(tensors, plain)
        file = os.open(plain, os.O_RDONLY)
        os.fsync(file)
        os.close(file)

    def put() -> None:
        with Store(folder / f"put{next(number)}") as store:
            store.put(memory, "m")

    save()
    store = Store(folder / "s")
    store.put(memory, "m")
    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "put (durable) / save + fsync": (save, put),
    }

    def load() -> None:
        touch(load_file(plain))

    for verify in ("off", "full", "fast", "deep"):
        store.get("m", verify=verify)  # warm

        def get(verify: str = verify) -> KVMemory:
            return store.get("m", verify=verify)

        if verify != "off":
            sides[f"get {verify}, its check reads every byte"] = (load, get)
        sides[f"get {verify}, then every byte once more"] = (load, lambda get=get: touch(get()))
    live = Store(folder / "s", ram=2 * memory.nbytes)
    live.get("m")
    sides["get from RAM, then every byte"] = (load, lambda: touch(live.get("m")))
    megabytes = memory.nbytes / 1e6
    print(f"{megabytes:.0f} MB of tensors, {pairs} pairs, torch threads {torch.get_num_threads()}")
    print("| operation | plain ms | store ms (min-max) | store MB/s | ratio (min-max) |")
    print("|---|---|---|---|---|")
    for name, (theirs, ours) in sides.items():
        found = [(seconds(theirs), seconds(ours)) for _ in range(pairs)]
        ratio = sorted(a / b for a, b in found)
        own = sorted(b * 1e3 for _, b in found)
        middle = statistics.median(own)
        print(
            f"| {name} | {statistics.median(a for a, _ in found) * 1e3:.1f} | {middle:.1f} "
            f"({own[0]:.1f}-{own[-1]:.1f}) | {megabytes / middle * 1e3:.0f} | "
            f"{statistics.median(ratio):.2f} ({ratio[0]:.2f}-{ratio[-1]:.2f}) |",
            flush=True,
        )


def many(folder: Path, count: int) -> None:
    """Prints what a store of many memories takes.

    Args:
        folder: where to write.
        count: how many memories.
    """
    store = Store(folder / "many", "none")
    batch = 2000
    for start in range(0, count, batch):
        made = {
            f"n/{n:06d}": memory_of(2, n, layers=1, dim=2)
            for n in range(start, min(start + batch, count))
        }
        store.put_many(made)
        if (start + batch) in (2000, 20000, count):
            one = [memory_of(2, 10**7 + start + k, layers=1, dim=2) for k in range(20)]
            took = [seconds(lambda m=m: store.put(m, "probe", force=True)) for m in one]
            print(
                f"{start + batch} memories: one put {statistics.median(took) * 1e3:.2f} ms",
                flush=True,
            )
    store.close()
    opened = [seconds(lambda: Store(folder / "many", "none").names) for _ in range(5)]
    store = Store(folder / "many", "none")
    record = store.log("n/000100")[0].record
    for name, action in {
        "look a name up": lambda: store.log("n/000777"),
        "look a digest up": lambda: record[:16] in store,
        "ls, a page of 50": lambda: store.ls(limit=50, after="n/001"),
        "get": lambda: store.get("n/000500"),
    }.items():
        took = sorted(seconds(action) for _ in range(50))
        print(f"{name}: p50 {took[25] * 1e3:.2f} ms, p99 {took[-1] * 1e3:.2f} ms")
    print(f"open: {statistics.median(opened) * 1e3:.1f} ms")


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=256, help="MiB of keys and values")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--memories", type=int, help="count them instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.memories:
            many(Path(folder), args.memories)
        else:
            throughput(Path(folder), args.size, args.pairs)


if __name__ == "__main__":
    main()
