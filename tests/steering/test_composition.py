"""Steer in memories that are more than captured: biased, compacted, trained, stored."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kvedit as kv
from kvedit.editors import Concat, Emphasize, Knorm, Steer
from kvedit.memory import KVMemory
from kvedit.models.tiny import tiny_model
from kvedit.steering import prompted, steered
from kvedit.testing.steering import random_delta
from kvedit.testing.tolerances import FP64_ORACLE

CONTEXT = "The refund window is 60 days, and you would not wait for it."
PROMPT, AFTER = " How long is it, the window?", " It is"


def read(model: Any, memory: KVMemory, ids: torch.Tensor) -> torch.Tensor:
    with kv.attach(model, memory) as session:
        return session.forward(ids[None])[0]


def as_cartridge(memory: KVMemory, seed: int = 0) -> KVMemory:
    """Slots that no token made, at positions of their own, as a trained one has them."""
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for index, layer in memory.layers.items():
        noise = [
            torch.randn(x.shape, generator=draw).to(x) * 0.3 for x in (layer.keys, layer.values)
        ]
        layers[index] = dataclasses.replace(
            layer, keys=layer.keys + noise[0], values=layer.values + noise[1],
            source=torch.full_like(layer.source, -1),
        )  # fmt: skip
    return dataclasses.replace(memory, layers=layers, source=None)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("cartridge", "llama"), ("cartridge", "gemma3"), ("packed", "llama"),
        ("packed", "gpt_neox"), ("masked", "llama"), ("masked", "qwen3"), ("biased", "gpt_neox"),
        ("joined", "llama"),
    ],
)  # fmt: skip
def test_the_prompt_behind_it_is_steered_and_nothing_else(kind: str, family: str) -> None:
    model, tokenizer = tiny_model(family, dtype=torch.float64)
    memory = kv.capture(model, tokenizer, CONTEXT)
    base = {
        "cartridge": lambda m: as_cartridge(m),
        "packed": lambda m: Knorm(budget=8, layout="packed")(m),
        "masked": lambda m: Knorm(budget=8, layout="masked")(m),
        "biased": lambda m: Emphasize("60 days", strength=2.0)(m),
        "joined": lambda m: Concat()(as_cartridge(m), m),
    }[kind](memory)
    delta = random_delta(model, tokenizer)
    whole = prompted(model, tokenizer, base, PROMPT)
    edited = Steer(keys=0.6, values=3.0)(whole, delta.operand())
    held = base.layers[0].slots
    for index, layer in edited.layers.items():
        old = whole.layers[index]
        moved = (layer.values != old.values).any(dim=2) | (layer.keys != old.keys).any(dim=2)
        assert moved[:, -1].all()
        assert not moved[:, :-1].any()
        assert layer.slots > held if index == 0 else True
        assert (layer.bias is None) == (old.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, old.bias)
    ids = tokenizer(AFTER, add_special_tokens=False, return_tensors="pt").input_ids[0]
    logits = read(model, edited, ids)
    assert (logits - read(model, whole, ids)).abs().max() > 1e-3
    # The same by hand: transformers' attention reads these very tensors, nothing else is added.
    changed = {}
    for index, layer in whole.layers.items():
        added = edited.layers[index].values[:, -1] - layer.values[:, -1]
        assert (added - 3.0 * delta.vectors["values"][index]).abs().max() <= 1e-6
        keys, values = layer.keys.clone(), layer.values.clone()
        keys[:, -1] = edited.layers[index].keys[:, -1]
        values[:, -1] += 3.0 * delta.vectors["values"][index]
        changed[index] = dataclasses.replace(layer, keys=keys, values=values)
    assert (read(model, whole.with_layers(changed), ids) - logits).abs().max() <= FP64_ORACLE


def test_bias_before_and_after_is_one_memory() -> None:
    model, tokenizer = tiny_model("llama", dtype=torch.float64)
    memory = prompted(model, tokenizer, kv.capture(model, tokenizer, CONTEXT), PROMPT)
    steer, operand = Steer(keys=0.5, values=2.0), random_delta(model, tokenizer).operand()
    bias = Emphasize("60 days", strength=2.0)
    assert bias(steer(memory, operand)).digest == steer(bias(memory), operand).digest


def test_both_kinds_of_steering_go_together() -> None:
    model, tokenizer = tiny_model("llama", dtype=torch.float64)
    memory = prompted(model, tokenizer, None, CONTEXT)
    edited = Steer(values=2.0)(memory, random_delta(model, tokenizer).operand())
    stream = random_delta(model, sites=("residual",), scale=0.2)
    ids = tokenizer(AFTER, add_special_tokens=False, return_tensors="pt").input_ids[0]
    with steered(model, stream, 2.0):
        both, one = read(model, edited, ids), read(model, memory, ids)
    other = read(model, edited, ids)
    assert min((both - one).abs().max(), (both - other).abs().max()) > 1e-3


FRESH = """
import sys, torch, kvedit as kv
from safetensors.torch import save_file
torch.set_num_threads(1)
model, tokenizer = kv.testing.tiny_model("gemma3")
memory = kv.Store(sys.argv[1]).get("steered")
hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
assert not hooks and memory.servable()
ids = torch.tensor([[int(t) for t in sys.argv[3].split(",")]])
with kv.attach(model, memory) as session:
    logits = session.forward(ids)
save_file({"logits": logits}, sys.argv[2])
print(kv.steering.go_on(model, tokenizer, memory, max_new_tokens=5))
assert not any(name.startswith("kvedit.steering.continuous") for name in sys.modules)
"""


def steered_and_stored(place: Path) -> Any:
    """A model, its tokenizer, and a memory before and after an edit that is stored."""
    model, tokenizer = tiny_model("gemma3")
    memory = prompted(model, tokenizer, None, [{"role": "user", "content": CONTEXT}])
    edited = Steer(keys=0.6, values=3.0)(memory, random_delta(model, tokenizer).operand())
    with kv.Store(place) as store:
        store.put(edited, "steered")
    return model, tokenizer, memory, edited


def test_a_stored_memory_needs_no_hook_and_no_delta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model built anew and what the store gives: the same bits, and no hook in the model."""
    first, tokenizer, memory, edited = steered_and_stored(tmp_path)
    said = kv.steering.go_on(first, tokenizer, edited, max_new_tokens=5)
    model, tokenizer = tiny_model("gemma3")
    for name in ("kvedit.steering.continuous", "kvedit.editors.steering", "kvedit.memory.delta"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails from here on
    with kv.Store(tmp_path) as store:
        stored = store.get("steered")
    assert stored.digest == edited.digest
    assert stored.servable()
    ids = torch.tensor(tokenizer("\nIt is", add_special_tokens=False).input_ids)
    logits = read(model, stored, ids)
    assert torch.equal(logits, read(first, edited, ids))
    assert not torch.equal(logits, read(first, memory, ids))
    assert kv.steering.go_on(model, tokenizer, stored, max_new_tokens=5) == said
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "generate" not in vars(model)


@pytest.mark.slow
def test_a_stored_memory_needs_no_hook_in_a_fresh_process(tmp_path: Path) -> None:
    model, tokenizer, memory, edited = steered_and_stored(tmp_path / "store")
    ids = tokenizer("\nIt is", add_special_tokens=False).input_ids
    out = tmp_path / "logits.safetensors"
    arguments = [str(tmp_path / "store"), str(out), ",".join(map(str, ids))]
    done = subprocess.run([sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = read(model, edited, torch.tensor(ids))
    assert torch.equal(load_file(out)["logits"][0], here)
    assert not torch.equal(here, read(model, memory, torch.tensor(ids)))
    assert done.stdout.strip("\n") == kv.steering.go_on(
        model, tokenizer, edited, max_new_tokens=5
    ).strip("\n")
