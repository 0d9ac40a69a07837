"""Gradients: they reach what is trained and nothing else, and equal finite differences."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kvedit as kv
from kvedit.cartridges import Freeze, Objective, TrainableMemory, collate, open_packed
from kvedit.editors import Drop, Suppress
from kvedit.errors import InvalidArgument, UnknownName

FAMILIES = ["llama", "qwen3", "gemma3", "gpt_neox"]


def loss_of(base, student, samples):
    found = Objective(distill=1.0, next_token=0.3).losses(
        base, student.prefix(), collate([samples])
    )
    return found.total / sum(len(sample) - sample.start for sample in samples)


def nudge(student):
    """Moves parameters away from the start, so that nothing is checked at a special point."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter += 0.1 * noise.to(parameter)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_reaches_every_slot_that_is_seen_and_no_frozen_one(family, subject, samples):
    found = subject(family)
    freeze = Freeze(sinks=2, positions=(5, 9), layers=(1,), bias=False)
    student = TrainableMemory(found.memory, freeze)
    assert set(found.memory.layers) - set(student.trained()) == {1}
    with open_packed(found.model) as base:
        loss_of(base, student, samples).backward()
    frozen = {0, 1, 5, 9}
    for index, layer in student.trained().items():
        assert set(range(found.memory.slots)) - set(layer.slots.tolist()) == frozen
        # one sample is supervised from its first token on, which sees the most of a window
        window = found.memory.model.layers[index].window or found.memory.next_position + 1
        seen = layer.slots > found.memory.next_position - window
        for parameter in (layer.keys, layer.values):
            assert torch.equal(parameter.grad.abs().amax(dim=(0, 2)) > 0, seen)
        assert torch.equal(layer.bias.grad.abs().amax(dim=0) > 0, seen)
    assert all(weight.grad is None for weight in found.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["keys", "values", "bias"])
def test_gradients_equal_finite_differences(family, kind, subject, samples):
    found = subject(family, dtype=torch.float64)
    memory = Suppress(span="the box", strength=float("inf"), heads=(0,))(found.memory)
    student = TrainableMemory(memory, Freeze(bias=False))
    nudge(student)
    chosen = [p for name, p in student.named_parameters() if name.endswith(kind)]
    assert all(parameter.dtype == torch.float64 for parameter in chosen)
    draw = torch.Generator().manual_seed(1)
    along = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in chosen]
    here = [parameter.detach().clone() for parameter in chosen]
    with open_packed(found.model) as base:
        loss_of(base, student, samples[:4]).backward()
        slope = sum(float((p.grad * d).sum()) for p, d in zip(chosen, along, strict=True))

        def at(step):
            with torch.no_grad():
                for parameter, start, direction in zip(chosen, here, along, strict=True):
                    parameter.copy_(start + step * direction)
                return float(loss_of(base, student, samples[:4]))

        near, far = ((at(h) - at(-h)) / (2 * h) for h in (5e-3, 1e-2))
    # Richardson's extrapolation. Norms stay in float32 in all of these families but gpt_neox.
    measured = (4 * near - far) / 3
    assert measured == pytest.approx(slope, rel=1e-7 if family == "gpt_neox" else 1e-3)
    assert abs(slope) > 1e-3


def test_a_memory_comes_back_with_its_frozen_parts_shared(subject):
    memory = Suppress(span="the box", strength=float("inf"), kv_heads=(0,))(subject().memory)
    student = TrainableMemory(memory, Freeze(sinks=3, keys=True, layers=(-1,), bias=False))
    nudge(student)
    made = student.to_memory()
    last = len(memory.layers) - 1
    assert made.layers[last] is memory.layers[last]
    for index in range(last):
        old, new = memory.layers[index], made.layers[index]
        assert new.keys is old.keys
        assert new.positions is old.positions
        assert torch.equal(new.values[:, :3], old.values[:, :3])
        assert not torch.equal(new.values[:, 3:], old.values[:, 3:])
        assert new.source.tolist() == [*old.source[:3].tolist(), *[-1] * (old.slots - 3)]
        evicted = old.bias == -torch.inf
        assert torch.equal(new.bias == -torch.inf, evicted)
        assert not torch.equal(new.bias[~evicted], old.bias[~evicted])
    assert (made.next_position, made.source) == (memory.next_position, memory.source)
    memory.check_unmodified()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_not_moved_comes_back_bit_for_bit(dtype, subject):
    memory = subject().memory.to(dtype=dtype)
    student = TrainableMemory(memory)
    assert all(p.dtype == torch.float32 for p in student.parameters())
    made = student.to_memory()
    for old, new in zip(memory.layers.values(), made.layers.values(), strict=True):
        assert torch.equal(old.keys, new.keys)
        assert torch.equal(old.values, new.values)
        assert new.bias is None
    narrow = TrainableMemory(memory, master=None)
    assert all(p.dtype == dtype for p in narrow.parameters())


def test_masters_keep_what_half_precision_would_round_away(subject):
    memory = subject().memory.to(dtype=torch.bfloat16)
    moved = []
    for master in (torch.float32, None):
        student = TrainableMemory(memory, master=master)
        values = student.trained()[0].values
        with torch.no_grad():
            values.fill_(4.0)
            for _ in range(100):
                values += 1e-3
        moved.append(float(student.to_memory().layers[0].values[0, 1, 0]))
    assert moved == [pytest.approx(4.1, rel=1e-2), 4.0]


def test_training_a_bias_from_none_starts_at_zero_and_changes_nothing_at_first(subject, samples):
    found = subject()
    plain = TrainableMemory(found.memory)
    biased = TrainableMemory(found.memory, Freeze(bias=False))
    assert plain.prefix().layers[0].bias is None
    with torch.no_grad(), open_packed(found.model) as base:
        one, two = (float(loss_of(base, student, samples)) for student in (plain, biased))
    assert one == pytest.approx(two, rel=1e-5)


def test_drift_is_relative_to_the_start(subject):
    student = TrainableMemory(subject().memory, Freeze(sinks=0, bias=False))
    assert {(d.keys, d.values, d.bias) for d in student.drift().values()} == {(0.0, 0.0, 0.0)}
    with torch.no_grad():
        layer = student.trained()[1]
        layer.keys *= 1.5
        layer.bias += 0.25
    moved = student.drift()[1]
    assert moved.keys == pytest.approx(0.5, rel=1e-5)
    assert (moved.values, moved.bias) == (0.0, 0.25)


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        ({"sinks": 1000}, "nothing is left"),
        ({"keys": True, "values": True}, "nothing is left"),
        ({"layers": [0, 1, 2]}, "nothing is left"),
    ],
)
def test_a_freeze_that_leaves_nothing_is_refused(freeze, words, subject):
    with pytest.raises(InvalidArgument, match=words):
        TrainableMemory(subject().memory, Freeze.of(freeze))


def test_bad_freezes_are_refused(subject):
    with pytest.raises(InvalidArgument, match="sinks"):
        Freeze(sinks=-1)
    with pytest.raises(InvalidArgument, match="layers"):
        Freeze(layers=("a",))
    with pytest.raises(UnknownName, match="layer"):
        TrainableMemory(subject().memory, Freeze(layers=(9,)))


def test_layers_of_different_length_train_together(subject, samples):
    found = subject()
    ragged = Drop(span={"tokens": [-9, -2]}, layers=(1,))(found.memory)
    student = TrainableMemory(ragged)
    with open_packed(found.model) as base:
        loss_of(base, student, samples[:3]).backward()
    assert [len(layer.slots) for layer in student.trained().values()] == [
        layer.slots - 1 for layer in ragged.layers.values()
    ]
    assert dataclasses.replace(ragged).digest == ragged.digest
    assert kv.compare(ragged, student.to_memory()) is not None
