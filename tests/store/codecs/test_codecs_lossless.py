"""Lossless encodings give back every bit, whatever the dtype, the shape and the strides."""

import subprocess
import sys

import pytest
import torch

from kvedit.errors import InvalidArgument, MissingDependency, UnknownName
from kvedit.store.codecs import CODECS, LOSSLESS, LOSSY, decode, encode

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
)
HEADED = [(2, slots, dim) for slots in (0, 1, 2, 255, 256) for dim in (1, 7, 64)] + [(0, 5, 3)]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def random_tensor(shape, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=draw).bool()
    if not dtype.is_floating_point:
        return torch.randint(0, 100, shape, generator=draw).to(dtype)
    return torch.randn(shape, generator=draw).to(dtype)


def round_trip(tensor, kind, codec, axis):
    made = encode(tensor, kind, codec, axis)
    found = decode(made.encoding, made.data, tensor.dtype, tuple(tensor.shape), kind)
    assert found.dtype == tensor.dtype and found.shape == tensor.shape and found.is_contiguous()
    return made, found


@pytest.mark.parametrize("codec", LOSSLESS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADED, ids=str)
def test_every_bit_comes_back(shape, dtype, codec):
    tensor = random_tensor(shape, dtype)
    made, found = round_trip(tensor, "keys", codec, 1)
    assert bits(found) == bits(tensor)
    assert len(made.data) <= tensor.nbytes


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("slots", [0, 1, 255, 256])
def test_other_kinds_are_exact_under_every_codec(slots, codec):
    bias = torch.zeros(9, slots)
    bias[:, ::3] = -torch.inf
    positions = torch.arange(slots)
    offsets = torch.stack([positions * 4, positions * 4 + 3], dim=1)
    for kind, tensor, axis in (
        ("bias", bias, 1),
        ("positions", positions, 0),
        ("source", positions - 1, 0),
        ("tokens", random_tensor((slots,), torch.int64), 0),
        ("offsets", offsets, 0),
    ):
        assert bits(round_trip(tensor, kind, codec, axis)[1]) == bits(tensor), kind


@pytest.mark.parametrize("codec", LOSSLESS)
def test_strided_pieces_are_encoded_as_what_they_show(codec):
    whole = torch.randn(4, 300, 10).to(torch.bfloat16)
    for piece in (
        whole[1:3, 40:296],
        whole[:, :9, ::2],
        whole.transpose(1, 2)[:, :, :50],
        whole[:, :1].transpose(0, 2),
        whole.permute(1, 2, 0)[:2, :, :1],  # contiguous to torch, and its last stride is not 1
        whole[:1, :1].expand(3, 5, 10)[..., :3],
    ):
        assert bits(round_trip(piece, "keys", codec, 1)[1]) == bits(piece)
        assert encode(piece, "keys", codec, 1) == encode(piece.contiguous(), "keys", codec, 1)


@pytest.mark.parametrize(
    ("codec", "axis"), [(c, 1) for c in LOSSY] + [(c, a) for c in LOSSLESS for a in (0, 1, 2)]
)
def test_equal_slots_are_kept_once(axis, codec):
    shape = [3, 4, 5]
    one = torch.randn([1 if place == axis else n for place, n in enumerate(shape)])
    shape[axis] = 200
    tensor = one.expand(shape)
    made, found = round_trip(tensor, "keys", codec, axis)
    assert made.encoding == "constant" and len(made.data) == 1 + one.nbytes
    assert bits(found) == bits(tensor)


def test_constant_compares_bits_not_numbers():
    nan = torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    same = nan[:1].expand(2, 256, 4)
    made, found = round_trip(same, "keys", "raw", 1)
    assert made.encoding == "constant" and bits(found) == bits(same)

    zeros = torch.zeros(2, 256, 4)
    zeros[1, 100, 2] = -0.0
    made, found = round_trip(zeros, "keys", "raw", 1)
    assert made.encoding == "raw" and bits(found) == bits(zeros)


def test_one_different_slot_is_no_constant():
    tensor = torch.ones(2, 256, 4)
    for slot in (0, 100, 255):
        tensor[:] = 1
        tensor[1, slot, 3] = 2
        assert encode(tensor, "keys", "raw", 1).encoding == "raw"


def test_planes_are_smaller_where_exponents_repeat():
    numbers = torch.randn(3, 256, 64).to(torch.bfloat16)
    made = encode(numbers, "keys", "planes-zstd", 1)
    assert made.encoding == "planes-zstd" and len(made.data) < 0.85 * numbers.nbytes
    noise = torch.randint(-128, 128, (3, 256, 64), dtype=torch.int8)
    assert encode(noise, "keys", "planes-zstd", 1).encoding == "raw"


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_gets_so_small_that_a_reader_would_refuse_it(codec):
    for kind, shape in (("keys", (64, 256, 128)), ("bias", (128, 256))):
        tensor = torch.zeros(shape)
        tensor.reshape(-1)[0] = 1
        made, found = round_trip(tensor, kind, codec, 1)
        assert tensor.nbytes <= 256 * len(made.data) + 4096
        if codec == "planes-zstd" or (kind == "bias" and codec != "raw"):
            assert made.encoding == "planes-zstd" and len(made.data) < tensor.nbytes / 200
            assert torch.equal(found, tensor)


def test_nothing_is_shared_with_the_bytes():
    tensor = torch.randn(2, 3, 4)
    data = bytearray(encode(tensor, "keys", "raw", 1).data)
    found = decode("raw", memoryview(data), tensor.dtype, (2, 3, 4), "keys")
    data[:] = bytes(len(data))
    assert bits(found) == bits(tensor)


def test_what_can_not_be_encoded_is_said():
    with pytest.raises(UnknownName, match="planes-zstd"):
        encode(torch.zeros(2, 3, 4), "keys", "zip", 1)
    with pytest.raises(InvalidArgument, match="256 slots, found 257"):
        encode(torch.zeros(2, 257, 4), "keys", "raw", 1)


def test_zstandard_is_optional(monkeypatch):
    tensor = torch.randn(2, 50, 4).to(torch.bfloat16)
    positions = torch.arange(50)
    made = encode(positions, "positions", "planes-zstd", 0)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependency, match=r"kvedit\[codecs\]"):
        encode(tensor, "keys", "planes-zstd", 1)
    with pytest.raises(MissingDependency):
        decode(made.encoding, made.data, torch.int64, (50,), "positions")
    assert bits(round_trip(tensor, "keys", "raw", 1)[1]) == bits(tensor)
    assert encode(tensor, "keys", "int8", 1).encoding == "int8-g32"


def test_importing_codecs_imports_no_zstandard():
    code = "import kvedit.store.codecs, sys; print('zstandard' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
