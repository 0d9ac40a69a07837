"""Lossy encodings: closed-form error bounds, an independent reference, the same bits every time."""

import hashlib

import numpy as np
import pytest
import torch

from kvedit.errors import InvalidArgument
from kvedit.store.codecs import LOSSY, decode, encode, quantise

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
SHAPES = [(2, slots, dim) for slots in (0, 1, 33, 255, 256) for dim in (1, 7, 65)]
ENCODINGS = {"int8": "int8-g32", "int4": "int4-kivi", "int2": "int2-kivi"}
# One rounding to the dtype, relative to the largest number of a group.
ROUNDING = {
    torch.float64: 2**-23,
    torch.float32: 2**-23,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
    torch.float8_e4m3fn: 2**-4,
    torch.float8_e5m2: 2**-3,
}


def random_tensor(shape, dtype, seed=0, scale=1.0, offset=0.0):
    draw = torch.Generator().manual_seed(seed)
    channels = torch.randn(1, 1, shape[2], generator=draw) * offset
    return (torch.randn(shape, generator=draw) * scale + channels).to(dtype)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def round_trip(tensor, kind, codec):
    made = encode(tensor, kind, codec, 1)
    return made, decode(made.encoding, made.data, tensor.dtype, tuple(tensor.shape), kind)


def group_error_bound(tensor, kind, codec):
    """Half a step per element, from the definition: loops, float64, no shared code."""
    x = tensor.double().numpy()
    bound = np.zeros(x.shape)
    per_channel = kind == "keys" and codec != "int8"
    moved = np.moveaxis(x, 1, 2) if per_channel else x
    view = np.moveaxis(bound, 1, 2) if per_channel else bound
    for start in range(0, moved.shape[2], 32):
        group = moved[:, :, start : start + 32]
        high, low = group.max(axis=2, keepdims=True), group.min(axis=2, keepdims=True)
        if codec == "int8":
            step = np.maximum(abs(high), abs(low)) / 127
        else:
            step = (high - low) / {"int4": 15, "int2": 3}[codec]
        # A scale has 8 bits and is rounded up: at most 2**-7 more than the exact step.
        view[:, :, start : start + 32] = step / 2 * (1 + 2**-7)
        view[:, :, start : start + 32] += np.abs(group).max(axis=2, keepdims=True) * (
            ROUNDING[tensor.dtype] + 2**-22
        )
    return bound


@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_half_a_step(shape, dtype, codec, kind):
    tensor = random_tensor(shape, dtype, offset=3)
    made, found = round_trip(tensor, kind, codec)
    assert len(made.data) <= tensor.nbytes
    assert bits(found) == bits(quantise(tensor, kind, codec))
    if made.encoding != ENCODINGS[codec]:  # it would have saved nothing
        assert bits(found) == bits(tensor)
        return
    assert np.all(
        (found.double() - tensor.double()).abs().numpy() <= group_error_bound(tensor, kind, codec)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("codec", "ratio"), [("int8", (3.7, 1.88)), ("int4", (5.8, 3.2))])
def test_sizes(codec, ratio, dtype):
    tensor = random_tensor((3, 256, 64), dtype)
    made, _ = round_trip(tensor, "keys", codec)
    assert tensor.nbytes / len(made.data) > ratio[dtype == torch.bfloat16] - 0.01


def rounded_up(number):
    down = torch.tensor(number).bfloat16()
    up = torch.nextafter(down, torch.tensor(torch.inf).bfloat16())
    return np.float32((down if down.float() >= float(number) else up).float())


def reference(x, levels, axis):
    """KIVI's asymmetric rounding of lines of numbers along one axis, 32 at a time."""
    lines = np.moveaxis(x, axis, -1)
    result = np.empty_like(lines)
    for where in np.ndindex(lines.shape[:-1]):
        for start in range(0, lines.shape[-1], 32):
            part = lines[where][start : start + 32]
            zero = part.min()
            step = rounded_up((part.max() - zero) / np.float32(levels))
            result[where][start : start + 32] = np.rint((part - zero) / step) * step + zero
    return np.moveaxis(result, -1, axis)


@pytest.mark.parametrize(("kind", "axis"), [("keys", 1), ("values", 2)])
@pytest.mark.parametrize(("codec", "levels"), [("int4", 15), ("int2", 3)])
def test_kivi_axes(codec, levels, kind, axis):
    tensor = random_tensor((2, 71, 45), torch.float32, offset=5)
    expected = reference(tensor.numpy(), levels, axis)
    assert np.array_equal(quantise(tensor, kind, codec).numpy(), expected)
    other = reference(tensor.numpy(), levels, 3 - axis)
    assert not np.array_equal(quantise(tensor, kind, codec).numpy(), other)


def test_int8_groups_are_dims_of_one_token():
    tensor = random_tensor((2, 40, 64), torch.float32)
    far = tensor.clone()
    far[1, 7, 40] = 1e6
    changed = (quantise(tensor, "keys", "int8") != quantise(far, "keys", "int8")).nonzero()
    assert len(changed) and all(tuple(c[:2]) == (1, 7) and c[2] >= 32 for c in changed.tolist())


def test_channel_outliers_cost_keys_nothing():
    tensor = random_tensor((2, 256, 64), torch.float32)
    tensor[:, :, 5] += 100
    keys = (quantise(tensor, "keys", "int4") - tensor).norm()
    values = (quantise(tensor, "values", "int4") - tensor).norm()
    assert keys < 0.2 * values


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_strides_do_not_matter(kind, codec):
    whole = random_tensor((4, 300, 64), torch.bfloat16)
    piece = whole[1:3, 40:296]
    assert encode(piece, kind, codec, 1) == encode(piece.contiguous(), kind, codec, 1)
    before = whole.clone()
    assert torch.equal(quantise(piece, kind, codec), quantise(piece.contiguous(), kind, codec))
    assert torch.equal(whole, before)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", FLOATS[:4], ids=str)
def test_largest_and_smallest_numbers(dtype, codec):
    top = min(torch.finfo(dtype).max, 2.0**126)
    tiny = torch.finfo(dtype).tiny
    tensor = torch.tensor([top, -top, top / 3, tiny, -tiny, 0.0, -0.0, 1.0], dtype=torch.float64)
    tensor = tensor.to(dtype).repeat(2, 64, 8)
    tensor[0] = tensor[0] * 2.0**-100
    tensor[:, ::2] = tensor[:, ::2].flip(-1)
    for kind in ("keys", "values"):
        found = round_trip(tensor, kind, codec)[1]
        assert bool(found.isfinite().all())
        error = (found.double() - tensor.double()).abs()
        assert float(error.max()) <= top / 3 * 1.02


@pytest.mark.parametrize("codec", LOSSY)
def test_numbers_without_spread_are_exact(codec):
    # Every group of keys is one number; slots differ between the groups.
    tensor = torch.randn(2, 8, 64).to(torch.bfloat16).repeat_interleave(32, dim=1)
    if codec != "int8":
        assert bits(quantise(tensor, "keys", codec)) == bits(tensor)
    assert not quantise(torch.zeros(2, 64, 64), "values", codec).any()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_what_can_not_be_rounded_is_refused_by_name(bad, kind, codec):
    tensor = torch.randn(2, 5, 64)
    tensor[1, 2, 3] = bad
    with pytest.raises(InvalidArgument, match=f"{codec}.*{kind} hold NaN"):
        encode(tensor, kind, codec, 1)
    with pytest.raises(InvalidArgument, match=f"{codec}.*{kind} hold NaN"):
        quantise(tensor, kind, codec)


def test_quantise_leaves_the_rest_alone():
    bias, integers = torch.randn(4, 9), torch.ones(2, 9, 4, dtype=torch.int8)
    keys = torch.randn(2, 9, 64)
    assert quantise(bias, "bias", "int2") is bias
    assert quantise(integers, "keys", "int2") is integers
    assert quantise(keys, "keys", "planes-zstd") is keys
    repeated = keys[:, :1].expand(2, 9, 64)
    assert quantise(repeated, "keys", "int2") is repeated


# The format: these bytes may never change under these names.
PINNED = {
    ("int8", "keys"): "bbf04cccb18c4ee5",
    ("int4", "keys"): "e0c5b80224ca194a",
    ("int4", "values"): "723d4a631af63768",
    ("int2", "keys"): "54cf9a984842ab93",
    ("int2", "values"): "6b4a6beedf7f0a27",
}


@pytest.mark.parametrize(("codec", "kind"), PINNED)
def test_bytes_and_numbers_stay_as_they_are(codec, kind):
    steps = torch.arange(2 * 37 * 35, dtype=torch.float64)
    tensor = ((steps * 7919 % 1009 - 504) / 64).reshape(2, 37, 35).to(torch.bfloat16)
    made, found = round_trip(tensor, kind, codec)
    raw = found.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(made.data + raw).hexdigest()[:16] == PINNED[codec, kind]
