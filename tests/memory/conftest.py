"""Memories made by hand, without a model: equal calls give equal bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import settings

from kvedit.memory import (
    Fingerprint,
    KVMemory,
    LayerKV,
    LayerSpec,
    Lineage,
    LineageNode,
    Message,
    ModelSpec,
    RopeSpec,
    Source,
)

# The same examples every time, on a busy machine as well, and no folder of examples.
settings.register_profile("kvedit", deadline=None, derandomize=True, database=None)
settings.load_profile("kvedit")

TEXT = "The box is red.  The refund window\nis 60 days! Is the box blue?"


def build_spec(name: str = "toy") -> ModelSpec:
    """Three layers of four query heads over two KV heads; the middle one slides and has no RoPE."""
    rope = RopeSpec("default", (1.0, 0.1, 0.01, 0.001), 1.0, "half")
    full = LayerSpec("full", 4, 2, 8, 6, 8**-0.5, rope=rope)
    sliding = LayerSpec("sliding", 4, 2, 8, 6, 8**-0.5, window=5)
    prints = Fingerprint(config="c", weights="w", tokenizer="t")
    return ModelSpec("llama", name, (full, sliding, full), "rope", 512, 300, prints)


def build_source(text: str = TEXT, width: int = 3, messages: tuple[Message, ...] = ()) -> Source:
    """A BOS without characters, then one token per ``width`` characters."""
    cuts = [(at, min(at + width, len(text))) for at in range(0, len(text), width)]
    offsets = torch.tensor([(0, 0), *cuts], dtype=torch.int64)
    return Source(torch.arange(len(offsets)) % 300, text, offsets, messages)


def build_layer(slots: int, first: int = 0, bias: bool = False, scale: float = 1.0) -> LayerKV:
    """Numbers that a float32 holds exactly, so that no library version rounds them otherwise."""
    at = torch.arange(first, first + slots)
    keys = (torch.arange(2 * slots * 8).reshape(2, slots, 8) % 251) / 16 * scale
    values = (torch.arange(2 * slots * 6).reshape(2, slots, 6) % 241) / 32 - 1
    added = torch.zeros(4, slots) if bias else None
    if added is not None:
        added[1, ::3], added[2, 0] = 1.5, -math.inf
    return LayerKV(keys, values, at, at.clone(), added)


def build_toy(bias: bool = True, ragged: bool = True, source: Source | None = None) -> KVMemory:
    """A small memory; the sliding layer of a ragged one holds its last five slots only."""
    source = source or build_source()
    slots = len(source)
    held = min(5, slots) if ragged else slots
    layers = {
        0: build_layer(slots),
        1: build_layer(held, slots - held),
        2: build_layer(slots, bias=bias),
    }
    node = LineageNode("capture", "capture", 1, "{}", environment=(("threads", "1"),))
    return KVMemory(layers, build_spec(), slots, source, Lineage((node,)), rules=({"rule": "x"},))


@pytest.fixture(scope="session")
def toy() -> Any:
    """``toy(bias=True, ragged=True, source=None)``."""
    return build_toy


@pytest.fixture(scope="session")
def make() -> Any:
    """The builders by name."""
    return type(
        "Make",
        (),
        {
            "layer": staticmethod(build_layer),
            "source": staticmethod(build_source),
            "spec": staticmethod(build_spec),
            "text": TEXT,
        },
    )
