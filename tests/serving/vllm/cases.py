"""Memories of SmolLM2 for the acceptance tests, by name: captured, edited, made, compacted."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

import kvedit as kv
from kvedit.cartridges.initial import random_vectors
from kvedit.evals.filler import filler
from kvedit.memory import KVMemory
from kvedit.runtime import ModelReader
from kvedit.testing.steering import random_delta

TEXTS = {name: " ".join(filler(170, seed)) for seed, name in enumerate(("a", "b", "c"))}
QUESTIONS = {
    "a": " In short, the most important thing here is",
    "b": " After all of that, the old woman said:",
    "c": "\n\nQuestion: What was said about the house?\nAnswer:",
}
ALIGNED, UNALIGNED = 128, 101


def memories(model: Any, tokenizer: Any) -> Iterator[tuple[str, str, KVMemory]]:
    """Yields name, text whose question is asked, memory."""
    whole = {name: kv.capture(model, tokenizer, text) for name, text in TEXTS.items()}
    for text, memory in whole.items():
        ids = memory.tokens
        yield f"{text}-whole", text, memory
        yield f"{text}-aligned", text, kv.capture(model, tokenizer, ids[:ALIGNED])
        yield f"{text}-unaligned", text, kv.capture(model, tokenizer, ids[:UNALIGNED])
        yield f"{text}-no-values", text, with_values_zeroed(memory, 20, 60)
        yield f"{text}-keys-moved", text, with_shift(memory, "keys", 8)
        yield f"{text}-values-moved", text, with_shift(memory, "values", 0)
    yield from steered(model, tokenizer, whole)
    yield from compacted(model, tokenizer, whole)
    yield from made(model, tokenizer, whole)


def steered(model: Any, tokenizer: Any, whole: Any) -> Iterator[tuple[str, str, KVMemory]]:
    fit, held_out = ([" ".join(filler(200, seed))] for seed in (8, 9))
    queries = kv.calibrate(model, tokenizer, texts=fit, held_out=held_out, samples=40)
    for text, strength in (("a", 2.0), ("b", 0.8)):
        emphasised = kv.editors.Emphasize(span={"tokens": [30, 50]}, strength=strength)(whole[text])
        # All heads are compiled, also those that would not be certified: the engine must follow.
        every = kv.editors.Compile(mean_tolerance=1e3, spread_tolerance=1e3)
        yield f"{text}-compiled", text, every(emphasised, queries)
    delta = random_delta(model, tokenizer, scale=0.2).operand()
    yield "a-steered", "a", kv.editors.Steer(values=1.0, at="all")(whole["a"], delta)
    yield "c-steered", "c", kv.editors.Steer(keys=0.5, values=1.0, at="last")(whole["c"], delta)


def compacted(model: Any, tokenizer: Any, whole: Any) -> Iterator[tuple[str, str, KVMemory]]:
    reader = ModelReader(model, tokenizer)
    shared = {"heads": "shared", "rerotate": False}
    for text, kept in (("a", 0.5), ("b", 77)):
        snap = kv.editors.SnapKV(budget=kept, **shared)
        yield f"{text}-snap", text, snap(whole[text], reader=reader)
        yield f"{text}-knorm", text, kv.editors.Knorm(budget=kept, **shared)(whole[text])
    yield "c-dropped", "c", kv.editors.Drop(span={"tokens": [40, 90]})(whole["c"])
    packed = kv.editors.Knorm(budget=60, layout="packed", rerotate=True)
    yield "c-packed", "c", packed(whole["c"])
    yield "a-doubled", "a", with_bias(whole["a"], 30, 40, math.log(2))
    yield "b-trebled", "b", with_bias(whole["b"], 3, 9, math.log(3))


def made(model: Any, tokenizer: Any, whole: Any) -> Iterator[tuple[str, str, KVMemory]]:
    yield "cartridge-96", "a", random_vectors(model, tokenizer, 96, seed=1)
    yield "cartridge-257", "b", random_vectors(model, tokenizer, 257, seed=2)
    yield "one-slot", "c", kv.capture(model, tokenizer, whole["c"].tokens[:1])
    yield "one-made-slot", "a", only_slot(whole["a"], 37)


def with_values_zeroed(memory: KVMemory, start: int, stop: int) -> KVMemory:
    changed = {}
    for index, layer in memory.layers.items():
        values = layer.values.clone()
        values[:, start:stop] = 0
        changed[index] = dataclasses.replace(layer, values=values)
    return memory.with_layers(changed)


def with_shift(memory: KVMemory, kind: str, first: int) -> KVMemory:
    """A vector that is added to all keys, or values, of the layers from ``first`` on."""
    draw = torch.Generator().manual_seed(len(kind) + first)
    changed = {}
    for index, layer in memory.layers.items():
        tensor = getattr(layer, kind)
        vector = 0.3 * torch.randn(tensor.shape[0], 1, tensor.shape[2], generator=draw)
        if index >= first:
            changed[index] = dataclasses.replace(layer, **{kind: tensor + vector})
    return memory.with_layers(changed)


def with_bias(memory: KVMemory, start: int, stop: int, size: float) -> KVMemory:
    changed = {}
    for index, layer in memory.layers.items():
        bias = torch.zeros(memory.model.layers[index].query_heads, layer.slots)
        bias[:, start:stop] = size
        changed[index] = layer.add_bias(bias)
    return memory.with_layers(changed)


def only_slot(memory: KVMemory, slot: int) -> KVMemory:
    chosen = torch.tensor([slot])
    return memory.with_layers({i: layer.select(chosen) for i, layer in memory.layers.items()})
