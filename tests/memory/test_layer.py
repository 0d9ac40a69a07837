"""LayerKV and KVMemory: what fits together, and what is shared."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvedit.errors import InvalidArgument, MutatedMemory, ShapeMismatch, UnknownName
from kvedit.memory import KVMemory, LayerKV


def parts(slots: int = 4) -> dict[str, torch.Tensor]:
    return {
        "keys": torch.zeros(2, slots, 8),
        "values": torch.zeros(2, slots, 6),
        "positions": torch.arange(slots),
        "source": torch.arange(slots),
    }


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"keys": torch.zeros(4, 8)},
            ShapeMismatch,
            r"keys: .*head, slot, dim.* found shape \[4, 8\]",
        ),
        ({"values": torch.zeros(3, 4, 6)}, ShapeMismatch, r"values: .*head=2.*\[3, 4, 6\]"),
        ({"values": torch.zeros(2, 5, 6)}, ShapeMismatch, r"values: .*slot=4.*\[2, 5, 6\]"),
        ({"positions": torch.arange(5)}, ShapeMismatch, r"positions: .*slot=4.*\[5\]"),
        ({"source": torch.zeros(4, 1).long()}, ShapeMismatch, r"source: .*slot=4.*\[4, 1\]"),
        ({"positions": torch.arange(4.0)}, InvalidArgument, "int64, found torch.float32"),
        ({"source": torch.arange(4).int()}, InvalidArgument, "int64, found .*torch.int32"),
        ({"bias": torch.zeros(4)}, ShapeMismatch, r"bias: .*query_head, slot=4.*\[4\]"),
        ({"bias": torch.zeros(4, 5)}, ShapeMismatch, r"bias: .*slot=4.*\[4, 5\]"),
        ({"bias": torch.zeros(3, 4)}, InvalidArgument, "3 query heads, no multiple of 2 KV heads"),
        ({"bias": torch.zeros(4, 4).double()}, InvalidArgument, "float32, found torch.float64"),
        ({"bias": torch.full((4, 4), math.nan)}, InvalidArgument, r"NaN or \+inf.*-inf to evict"),
        ({"bias": torch.full((4, 4), math.inf)}, InvalidArgument, r"NaN or \+inf.*-inf to evict"),
    ],
)
def test_parts_of_a_layer_must_agree(
    changed: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LayerKV(**{**parts(), **changed})


def test_a_layer_may_be_empty_and_a_bias_may_evict() -> None:
    empty = LayerKV(**parts(0))
    assert (empty.slots, empty.nbytes) == (0, 0)
    assert LayerKV(**parts(), bias=torch.full((4, 4), -math.inf)).slots == 4


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"layers": {}}, InvalidArgument, "at least one layer"),
        ({"layers": {3: 0}}, UnknownName, "unknown layer '3'.*Known: 0, 1, 2"),
        ({"layers": {-1: 0}}, UnknownName, "unknown layer '-1'"),
        ({"next_position": 3}, InvalidArgument, "positions 0 to 3 must lie in 0 to .* = 2"),
        ({"positions": -1}, InvalidArgument, "positions -1 to 3 must lie in 0 to"),
        ({"source": 99}, InvalidArgument, "names tokens 0 to 99; expected 0 to 21"),
        ({"source": -2}, InvalidArgument, "names tokens -2 to 3; expected 0 to 21, or -1"),
        ({"keys": torch.zeros(4, 4, 8)}, ShapeMismatch, r"layer 0 keys: .*head=2.*\[4, 4, 8\]"),
        ({"keys": torch.zeros(2, 4, 9)}, ShapeMismatch, r"layer 0 keys: .*dim=8.*\[2, 4, 9\]"),
        ({"values": torch.zeros(2, 4, 8)}, ShapeMismatch, r"layer 0 values: .*dim=6.*\[2, 4, 8\]"),
        ({"bias": torch.zeros(2, 4)}, ShapeMismatch, r"layer 0 bias: .*query_head=4.*\[2, 4\]"),
    ],
)
def test_parts_of_a_memory_must_agree(
    changed: dict[str, Any], error: type[Exception], message: str, make: Any
) -> None:
    tensors = parts()
    for name in ("positions", "source"):
        if name in changed:
            at = 0 if changed[name] < 0 else -1
            tensors[name][at] = changed[name]
    tensors.update({k: v for k, v in changed.items() if isinstance(v, torch.Tensor)})
    if tensors["keys"].shape[0] == 4:
        tensors["values"] = torch.zeros(4, 4, 6)
    layers = dict.fromkeys(changed.get("layers", {0: 0}))
    with pytest.raises(error, match=message):
        KVMemory(
            {index: LayerKV(**tensors) for index in layers},
            make.spec(),
            changed.get("next_position", 4),
            make.source(),
        )


def test_slots_without_tokens_need_no_source(make: Any) -> None:
    tensors = {**parts(), "source": torch.full((4,), -1)}
    memory = KVMemory({0: LayerKV(**tensors)}, make.spec(), 4)
    assert (memory.tokens, memory.tokens_count, memory.slots) == (None, 0, 4)
    assert not memory.complete
    assert any("layers are missing" in reason for reason in memory.servable().reasons)
    with pytest.raises(InvalidArgument, match="names tokens 0 to 3; expected 0 to -1, or -1"):
        KVMemory({0: LayerKV(**parts())}, make.spec(), 4)


def test_layers_are_ordered_and_closed(toy: Any) -> None:
    memory = toy()
    assert list(
        dataclasses.replace(memory, layers=dict(reversed(memory.layers.items()))).layers
    ) == [
        0,
        1,
        2,
    ]
    with pytest.raises(TypeError):
        memory.layers[0] = memory.layers[2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        memory.next_position = 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        memory.layers[0].keys = memory.layers[2].keys


def test_layer_indices(toy: Any) -> None:
    memory = toy()
    assert memory.layer_indices(None) == [0, 1, 2]
    assert memory.layer_indices([-1, 0]) == [2, 0]
    some = dataclasses.replace(memory, layers={0: memory.layers[0], 2: memory.layers[2]})
    with pytest.raises(UnknownName, match=r"unknown layer '1'.*Known: 0, 2"):
        some.layer_indices([1])


@given(st.lists(st.integers(0, 8), unique=True), st.booleans())
def test_select_takes_what_a_plain_loop_takes(indices: list[int], as_mask: bool) -> None:
    slots = 9
    layer = LayerKV(
        torch.randn(2, slots, 8),
        torch.randn(2, slots, 6),
        torch.arange(slots) * 2,
        torch.arange(slots),
        torch.randn(4, slots),
    )
    chosen = torch.tensor(indices, dtype=torch.int64)
    if as_mask:
        indices = sorted(indices)
        mask = torch.zeros(slots, dtype=torch.bool)
        mask[indices] = True
        chosen = mask
    found = layer.select(chosen)
    assert layer.bias is not None
    assert found.bias is not None
    assert found.slots == len(indices)
    for new, old in enumerate(indices):
        assert torch.equal(found.keys[:, new], layer.keys[:, old])
        assert torch.equal(found.values[:, new], layer.values[:, old])
        assert torch.equal(found.bias[:, new], layer.bias[:, old])
        assert (found.positions[new], found.source[new]) == (2 * old, old)


@given(st.sets(st.sampled_from([0, 1, 2])), st.integers(1, 4))
def test_changed_layers_leave_the_others_where_they_are(
    make: Any, changed: set[int], slots: int
) -> None:
    layers = {index: LayerKV(**parts(slots)) for index in range(3)}
    memory = KVMemory(layers, make.spec(), slots, make.source())
    new = {index: memory.layers[index].add_bias(torch.ones(4, slots)) for index in changed}
    edited = memory.with_layers(new, next_position=slots + 1)
    assert edited.next_position == slots + 1
    for index, layer in edited.layers.items():
        # Even a changed layer shares its keys and values: only the bias is new.
        for name, tensor in memory.layers[index].tensors():
            assert getattr(layer, name).data_ptr() == tensor.data_ptr()
        assert (layer.bias is not None) == (index in changed)
        assert (layer is memory.layers[index]) == (index not in changed)


def test_biases_add_up_and_eviction_stays() -> None:
    layer = LayerKV(**parts(2))
    bias = torch.tensor([[1.0, -math.inf]]).repeat(4, 1)
    assert layer.add_bias(bias).add_bias(bias).bias.tolist() == [[2.0, -math.inf]] * 4
    assert layer.bias is None


WRITES = {
    "key": lambda memory: memory.layers[0].keys[0, 0, 0].add_(1),
    "value": lambda memory: memory.layers[2].values.zero_(),
    "position": lambda memory: memory.layers[1].positions.__setitem__(0, 1),
    "source": lambda memory: memory.layers[1].source.copy_(memory.layers[1].source + 0),
    "bias": lambda memory: memory.layers[2].bias.mul_(2),
    "view": lambda memory: memory.layers[0].keys[1].T[0].fill_(3.0),
    "detached": lambda memory: memory.layers[0].keys.detach().add_(1),
    "token": lambda memory: memory.tokens.__setitem__(0, 7),
    "offset": lambda memory: memory.source.offsets.add_(1),
}


@pytest.mark.parametrize("digested", [True, False], ids=["digested", "fresh"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_in_place_is_found(write: str, digested: bool, toy: Any) -> None:
    memory = toy()
    if digested:
        assert memory.digest
    WRITES[write](memory)
    for use in (lambda: memory.digest, memory.check_unmodified, memory.cut, memory.to):
        with pytest.raises(MutatedMemory, match="changed in place; memories are immutable"):
            use()


def test_a_write_to_a_shared_tensor_is_found_in_both(toy: Any) -> None:
    memory = toy()
    edited = memory.with_layers({0: memory.layers[0].add_bias(torch.ones(4, memory.slots))})
    edited.layers[1].keys.zero_()
    for one in (memory, edited):
        with pytest.raises(MutatedMemory, match="keys"):
            one.check_unmodified()


def test_a_write_through_data_goes_unseen(toy: Any) -> None:
    """The documented limit: torch counts no version for it. A rebuilt memory has another digest."""
    memory = toy()
    before = memory.digest
    memory.layers[0].keys.data[0, 0, 0] += 1
    assert memory.digest == before
    assert dataclasses.replace(memory).digest != before
    assert "tensor.data" in str(KVMemory.__doc__)


def test_inference_tensors_are_copied_so_that_writes_show() -> None:
    with torch.inference_mode():
        given = {name: tensor + 0 for name, tensor in parts().items()}
    layer = LayerKV(**given)
    assert not any(tensor.is_inference() for _, tensor in layer.tensors())
    layer.keys.add_(1)
    with pytest.raises(MutatedMemory, match="keys"):
        layer.check_unmodified()
