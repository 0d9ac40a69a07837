"""decode trusts nothing: damaged or made-up bytes are a ValueError, and allocate little."""

import struct
import tracemalloc

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.store.codecs import CODECS, decode, encode

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.int8)
ENCODINGS = ("raw", "constant", "planes-zstd", "int8-g32", "int4-kivi", "int2-kivi", "unknown", "")
KINDS = ("keys", "values", "bias", "positions")

sizes = st.integers(0, 300) | st.sampled_from([-1, 2**31, 2**62, 2**63, 2**70])
shapes = st.lists(sizes, max_size=4).map(tuple) | st.just((2, 64, 32))


def attempt(encoding, data, dtype, shape, kind):
    """Decodes, or not; whatever comes back is bounded by what was given."""
    try:
        found = decode(encoding, data, dtype, shape, kind)
    except ValueError:
        return None
    assert found.shape == shape and found.dtype == dtype and found.is_contiguous()
    assert found.nbytes <= 256 * len(data) + 4096
    return found


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(ENCODINGS),
    st.binary(max_size=600),
    st.sampled_from(DTYPES),
    shapes,
    st.sampled_from(KINDS),
)
def test_random_bytes(encoding, data, dtype, shape, kind):
    attempt(encoding, data, dtype, shape, kind)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(CODECS),
    st.sampled_from(("keys", "values")),
    st.booleans(),
    st.data(),
)
def test_mutated_bytes(codec, kind, repeated, data):
    tensor = torch.randn(2, 40, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensor = tensor[:, :1].expand(2, 40, 33) if repeated else tensor
    made = encode(tensor, kind, codec, 1)
    broken = bytearray(made.data)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= data.draw(st.integers(1, 255))
    stop = data.draw(st.integers(0, len(broken)))
    for piece in (broken, broken[:stop], broken + b"\0", broken[stop:] + broken[:stop]):
        attempt(made.encoding, bytes(piece), torch.bfloat16, (2, 40, 33), kind)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("repeated", [False, True])
def test_every_wrong_length_is_noticed(codec, repeated):
    tensor = torch.randn(2, 5, 8)
    tensor = tensor[:, :1].expand(2, 5, 8) if repeated else tensor
    made = encode(tensor, "keys", codec, 1)
    assert attempt(made.encoding, made.data, tensor.dtype, (2, 5, 8), "keys") is not None
    for wrong in [made.data[:stop] for stop in range(len(made.data))] + [made.data + b"\1"]:
        with pytest.raises(ValueError, match=r"bytes|axis|damaged"):
            decode(made.encoding, wrong, tensor.dtype, (2, 5, 8), "keys")
    for shape in ((2, 6, 8), (3, 5, 8), (2, 5, 9)):
        with pytest.raises(ValueError, match="bytes"):
            decode(made.encoding, made.data, tensor.dtype, shape, "keys") if not repeated else (
                decode(made.encoding, made.data, tensor.dtype, (shape[0] + 1, 5, 9), "keys")
            )


def framed(frame):
    return struct.pack("<I", len(frame)) + frame


def peak_of(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


ZEROS = bytes(1 << 26)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("level", [1, 3])  # windows of 512 KiB and 2 MiB
@pytest.mark.parametrize("shape", [(16,), (1 << 26,)])
def test_zip_bombs(shape, level, sized):
    frame = zstandard.ZstdCompressor(level=level, write_content_size=sized).compress(ZEROS)
    data = framed(frame)

    def attack():
        with pytest.raises(ValueError, match="bytes"):
            decode("planes-zstd", data, torch.int8, shape, "source")

    assert peak_of(attack) < 1 << 21


def test_a_frame_that_lies_about_its_size():
    frame = bytearray(zstandard.ZstdCompressor().compress(bytes(200)))
    facts = zstandard.get_frame_parameters(bytes(frame))
    assert facts.content_size == 200 and frame[5] == 200
    for size in (100, 201, 255):
        frame[5] = size
        with pytest.raises(ValueError, match=r"damaged|bytes"):
            decode("planes-zstd", framed(bytes(frame)), torch.int8, (size,), "source")


def test_a_frame_that_wants_a_large_window():
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    writer = compressor.compressobj(size=2000)
    frame = writer.compress(bytes(1000)) + writer.compress(bytes(1000)) + writer.flush()
    # Not a single segment: the head has the window on its own.
    frame = bytearray(frame)
    head = bytes([*frame[:4], 0x40, (27 - 10) << 3]) + (2000 - 256).to_bytes(2, "little")
    assert zstandard.get_frame_parameters(head).window_size == 1 << 27
    with pytest.raises(ValueError, match="window"):
        decode("planes-zstd", framed(head), torch.int8, (2000,), "source")


def test_a_skippable_or_second_frame_is_refused():
    frame = zstandard.ZstdCompressor().compress(bytes(200))
    skippable = struct.pack("<II", 0x184D2A50, 4) + bytes(4)
    for data in (framed(skippable + frame), framed(frame + frame), framed(frame) + frame):
        with pytest.raises(ValueError, match=r"bytes|damaged"):
            decode("planes-zstd", data, torch.int8, (200,), "source")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "shape",
    [(2**62, 2**62, 0), (0, 2**63, 1), (-1, 4, 4), (2, True, 3), (1.0, 2, 3), (1,) * 9, (2**40,)],
    ids=str,
)
def test_shapes_that_no_block_has(encoding, shape):
    with pytest.raises(ValueError, match=r"shape|bytes"):
        decode(encoding, b"", torch.float32, shape, "keys")


def test_the_bound_comes_before_anything_is_allocated():
    def attack():
        for encoding in ENCODINGS:
            with pytest.raises(ValueError, match="can't stand for"):
                decode(encoding, bytes(1000), torch.float32, (1 << 10, 256, 1 << 10), "keys")

    assert peak_of(attack) < 1 << 20


@pytest.mark.parametrize("encoding", ["int8-g32", "int4-kivi", "int2-kivi"])
def test_lossy_encodings_hold_keys_and_values_only(encoding):
    for kind, dtype, shape in (
        ("bias", torch.float32, (2, 2, 2)),
        ("keys", torch.int8, (2, 2, 2)),
        ("values", torch.float32, (8,)),
    ):
        with pytest.raises(ValueError, match="holds keys or values"):
            decode(encoding, bytes(100), dtype, shape, kind)


@pytest.mark.parametrize("codec", ["int8", "int4", "int2"])
def test_scales_that_are_not_finite(codec):
    made = encode(torch.randn(2, 64, 32), "values", codec, 1)
    for bits in (0x7F80, 0x7FC0, 0xFF80):
        data = struct.pack("<H", bits) + made.data[2:]
        with pytest.raises(ValueError, match="not finite"):
            decode(made.encoding, data, torch.float32, (2, 64, 32), "values")
        if codec != "int8":
            place = 2 * 2 * 64  # behind the scales
            data = made.data[:place] + struct.pack("<I", bits << 16) + made.data[place + 4 :]
            with pytest.raises(ValueError, match="not finite"):
                decode(made.encoding, data, torch.float32, (2, 64, 32), "values")
    largest = struct.pack("<H", 0x7F7F) + made.data[2:]
    assert bool(
        decode(made.encoding, largest, torch.float32, (2, 64, 32), "values").isfinite().all()
    )
