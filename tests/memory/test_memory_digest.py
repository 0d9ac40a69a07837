"""The content digest: equal for equal content, wherever; another one for any other content."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from kvedit.memory import KVMemory, Lineage, Message
from kvedit.memory.digest import digest_tensor

BUILDERS = Path(__file__).with_name("conftest.py")


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_another_process_finds_the_same_digest(hash_seed: str, toy: Any) -> None:
    code = f"import runpy; print(runpy.run_path({str(BUILDERS)!r})['build_toy']().digest, end='')"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == toy().digest


def test_equal_content_is_equal_digest(toy: Any) -> None:
    memory = toy()
    assert memory.digest == toy().digest == memory.digest
    assert len(memory.digest) == 64
    assert memory.digest != toy(bias=False).digest


def with_layer(memory: KVMemory, index: int, **changed: Any) -> KVMemory:
    return memory.with_layers({index: dataclasses.replace(memory.layers[index], **changed)})


def bumped(tensor: torch.Tensor, *at: int, by: float = 1) -> torch.Tensor:
    copy = tensor.clone()
    copy[at] += by
    return copy


def with_model(memory: KVMemory, **changed: Any) -> KVMemory:
    return dataclasses.replace(memory, model=dataclasses.replace(memory.model, **changed))


def with_source(memory: KVMemory, **changed: Any) -> KVMemory:
    return dataclasses.replace(memory, source=dataclasses.replace(memory.source, **changed))


def with_fingerprint(memory: KVMemory, **changed: Any) -> KVMemory:
    prints = dataclasses.replace(memory.model.fingerprint, **changed)
    return with_model(memory, fingerprint=prints)


def with_spec(memory: KVMemory, **changed: Any) -> KVMemory:
    first, *rest = memory.model.layers
    return with_model(memory, layers=(dataclasses.replace(first, **changed), *rest))


CHANGES: dict[str, Callable[[KVMemory], KVMemory]] = {
    "a key": lambda m: with_layer(m, 0, keys=bumped(m.layers[0].keys, 1, 21, 7, by=2**-4)),
    "a value": lambda m: with_layer(m, 1, values=bumped(m.layers[1].values, 0, 0, 0)),
    "sign of a zero": lambda m: with_layer(m, 2, bias=-m.layers[2].bias.abs()),
    "a position": lambda m: with_layer(m, 1, positions=bumped(m.layers[1].positions, 0, by=-1)),
    "a slot's token": lambda m: with_layer(m, 1, source=bumped(m.layers[1].source, 0, by=-1)),
    "a bias": lambda m: with_layer(m, 2, bias=bumped(m.layers[2].bias, 3, 1, by=1e-6)),
    "no bias": lambda m: with_layer(m, 2, bias=None),
    "a bias of zero": lambda m: with_layer(m, 0, bias=torch.zeros(4, m.slots)),
    "order of slots": lambda m: m.with_layers({0: m.layers[0].select(torch.arange(21, -1, -1))}),
    "a slot less": lambda m: m.with_layers({0: m.layers[0].select(torch.arange(21))}),
    "a layer less": lambda m: dataclasses.replace(m, layers={0: m.layers[0], 2: m.layers[2]}),
    "layers swapped": lambda m: m.with_layers({0: m.layers[2], 2: m.layers[0]}),
    "next position": lambda m: dataclasses.replace(m, next_position=m.next_position + 1),
    "rules": lambda m: dataclasses.replace(m, rules=({"rule": "y"},)),
    "no rules": lambda m: dataclasses.replace(m, rules=()),
    "a token": lambda m: with_source(m, tokens=bumped(m.tokens, 3)),
    "an offset": lambda m: with_source(m, offsets=bumped(m.source.offsets, 3, 1)),
    "text": lambda m: with_source(m, text=m.source.text + " "),
    "messages": lambda m: with_source(m, messages=(Message("user", "The"),)),
    "dtype": lambda m: m.to(dtype=torch.bfloat16),
    "config": lambda m: with_fingerprint(m, config="d"),
    "weights": lambda m: with_fingerprint(m, weights="d"),
    "tokenizer": lambda m: with_fingerprint(m, tokenizer="d"),
    "adapters": lambda m: with_fingerprint(m, adapters="d"),
    "family": lambda m: with_model(m, family="mistral"),
    "vocabulary": lambda m: with_model(m, vocabulary=301),
    "window": lambda m: with_spec(m, kind="sliding", window=8),
    "softcap": lambda m: with_spec(m, softcap=30.0),
    "rope": lambda m: with_spec(m, rope=None),
}


def test_every_part_counts(toy: Any) -> None:
    found = {name: change(toy()).digest for name, change in CHANGES.items()}
    found["nothing"] = toy().digest
    same = [(a, b) for a in found for b in found if a < b and found[a] == found[b]]
    assert same == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: with_model(m, name="another name"),
        lambda m: dataclasses.replace(m, lineage=Lineage()),
        lambda m: dataclasses.replace(m, verified=False),
        lambda m: dataclasses.replace(m, layers=dict(reversed(m.layers.items()))),
        lambda m: m.to(device="cpu"),
        lambda m: m.to(dtype=torch.float32),
        lambda m: with_layer(m, 0, keys=m.layers[0].keys.clone()),
        lambda m: with_layer(m, 0, keys=m.layers[0].keys.transpose(0, 2).clone().transpose(0, 2)),
        lambda m: with_layer(m, 0, keys=torch.cat([m.layers[0].keys] * 2, dim=1)[:, : m.slots]),
    ],
    ids=["name", "lineage", "verified", "order", "device", "dtype", "copy", "strides", "view"],
)
def test_what_does_not_count(change: Callable[[KVMemory], KVMemory], toy: Any) -> None:
    assert change(toy()).digest == toy().digest


def test_an_empty_layer_still_has_a_shape(toy: Any) -> None:
    memory = toy()
    empty = memory.with_layers({1: memory.layers[1].select(torch.zeros(0, dtype=torch.int64))})
    assert empty.digest != memory.digest
    assert {block.kind for block in empty.cut() if block.layer == 1} == {
        "keys",
        "values",
        "positions",
        "source",
    }


@pytest.mark.parametrize("slots", [255, 256, 257, 600])
def test_blocks_cut_a_memory_without_loss(slots: int, make: Any, toy: Any) -> None:
    memory = toy(source=make.source("x" * (slots - 1), 1))
    joined: dict[tuple[int, str], list[torch.Tensor]] = {}
    for block in memory.cut():
        joined.setdefault((block.layer, block.kind), []).append(block.tensor)
    for index, layer in memory.layers.items():
        for name, tensor in layer.tensors():
            axis = 0 if tensor.ndim == 1 else 1
            assert torch.equal(torch.cat(joined.pop((index, name)), dim=axis), tensor)
    assert torch.equal(torch.cat(joined.pop((-1, "tokens"))), memory.tokens)
    assert torch.equal(torch.cat(joined.pop((-1, "offsets"))), memory.source.offsets)
    assert not joined


def test_half_precision_has_its_own_bytes(toy: Any) -> None:
    memory = toy()
    half = memory.to(dtype=torch.bfloat16)
    assert (half.dtype, half.layers[2].bias.dtype) == (torch.bfloat16, torch.float32)
    assert half.to(dtype=torch.float32).digest == memory.digest or not torch.equal(
        half.layers[0].keys.float(), memory.layers[0].keys
    )
    assert half.layers[0].nbytes < memory.layers[0].nbytes


def test_a_tensor_is_its_dtype_shape_and_bytes() -> None:
    """The documented form, written out: a JSON line, then little-endian bytes, row by row."""
    numbers = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int64)
    row_major = b"".join(value.to_bytes(8, "little") for value in range(1, 7))
    expected = blake3(b'{"dtype":"int64","shape":[2,3]}\n' + row_major).hexdigest()
    assert digest_tensor(numbers) == expected
    assert digest_tensor(numbers.T.contiguous().T) == expected
    others = [numbers.reshape(3, 2), numbers.reshape(6), numbers.int(), numbers.T]
    others += [torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(0, 3).bfloat16()]
    assert len({expected, *map(digest_tensor, others)}) == len(others) + 1
