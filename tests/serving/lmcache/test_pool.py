"""Places in a server's shared memory."""

import uuid
from pathlib import Path

import pytest
import torch

from kvedit.errors import TierUnavailable
from kvedit.serving.lmcache import pool as module
from kvedit.serving.lmcache.pool import Pool

SIZE = 4096


@pytest.fixture
def name(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    found = f"lmcache_l1_pool_{uuid.uuid4().hex}"
    (tmp_path / found).write_bytes(bytes(SIZE))
    return found


def place(payload, offset=0, **other):
    dtype = str(payload.dtype).removeprefix("torch.")
    plain = {"offset": offset, "length": payload.nbytes, "shape": list(payload.shape)}
    return {**plain, "dtype": dtype, **other}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_is_held_bit_for_bit(name, dtype, tmp_path):
    payload = torch.randn(3, 4, 5).to(dtype)
    payload[0, 0, 0] = float("nan")
    with Pool(name, SIZE) as pool:
        assert not pool.holds(place(payload, 64), payload)
        pool.write(place(payload, 64), payload)
        assert pool.holds(place(payload, 64), payload)
        assert not pool.holds(place(payload, 64), -payload)
    raw = (tmp_path / name).read_bytes()
    assert raw[64 : 64 + payload.nbytes] == payload.view(torch.uint8).numpy().tobytes()
    assert not any(raw[:64])
    assert not any(raw[64 + payload.nbytes :])


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": SIZE - 8},
        {"offset": -4},
        {"length": 8},
        {"shape": [3, 4, 6]},
        {"dtype": "float16"},
    ],
)
def test_other_places_are_refused(name, wrong):
    payload = torch.ones(3, 4, 5)
    with Pool(name, SIZE) as pool, pytest.raises(TierUnavailable, match="another layout"):
        pool.write({**place(payload), **wrong}, payload)


def test_only_lmcaches_own_pools_are_opened(name):
    for other in ("../etc/passwd", "psm_1", "lmcache_l1_pool_/../x", ""):
        with pytest.raises(TierUnavailable, match="no pool of LMCache's"):
            Pool(other, SIZE)
    with pytest.raises(TierUnavailable, match=f"expected {SIZE + 1} bytes, found {SIZE}"):
        Pool(name, SIZE + 1)
    with pytest.raises(TierUnavailable, match="must run on this machine"):
        Pool("lmcache_l1_pool_gone", SIZE)


def test_nothing_stays_open(name):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with Pool(name, SIZE):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
