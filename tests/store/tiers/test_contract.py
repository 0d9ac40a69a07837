"""Every tier keeps the contract."""

import contextlib
import socket

import pytest

from kvedit.errors import CapacityExceeded, TierUnavailable
from kvedit.store import Store
from kvedit.store.remote import Objects
from kvedit.store.remote.depot import Depot
from kvedit.store.tiers import DepotTier, LiveTier, PoolTier
from kvedit.store.tiers.folder import FolderTier
from kvedit.testing.tier_contract import TierContract, contract_memory, put_memory


class TestRam(TierContract):
    @pytest.fixture
    def tier(self):
        return LiveTier(1 << 24)

    def damage(self, tier, record):
        tier.get(record).layers[0].keys[0, 0, 0] += 1  # written to in place: dropped
        return True

    def test_budget(self):
        tier = LiveTier(3 * contract_memory().nbytes)
        records = [put_memory(tier, contract_memory(seed)) for seed in range(5)]
        assert tier.records() == sorted(records[2:])
        tier.get(records[2])
        tier.pin(records[3])
        put_memory(tier, contract_memory(9))
        put_memory(tier, contract_memory(10))
        assert records[3] in tier and records[4] not in tier
        with pytest.raises(CapacityExceeded, match="budget"):
            put_memory(tier, contract_memory(11, slots=4000))


class TestFolder(TierContract):
    @pytest.fixture
    def tier(self, tmp_path):
        with contextlib.closing(FolderTier(Store(tmp_path / "s", durability="process"))) as made:
            yield made

    def damage(self, tier, record):
        for path in tier.store.path.glob("packs/*"):
            data = bytearray(path.read_bytes())
            data[-100] ^= 1
            path.write_bytes(data)
        return True


class TestDepotInRam(TierContract):
    @pytest.fixture
    def tier(self):
        return DepotTier(Depot(Objects.open("memory:///"), "tenant"))


class TestDepotInFolder(TierContract):
    @pytest.fixture
    def tier(self, tmp_path):
        self.folder = tmp_path / "remote"
        self.folder.mkdir()
        return DepotTier(Depot(Objects.open(f"file://{self.folder}")))

    def damage(self, tier, record):
        for path in self.folder.glob("**/*.safetensors"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
        return True


class _Pool:
    """A pool in this process that can lose and change things."""

    def __init__(self):
        self.held = {}

    def put(self, key, data):
        return self.held.setdefault(key, bytes(data)) == bytes(data)

    def get(self, key, digest=None):
        return bytearray(self.held[key]) if key in self.held else None

    def contains(self, key):
        return key in self.held

    def delete(self, key):
        return self.held.pop(key, None) is not None

    def close(self):
        self.held.clear()


class TestPool(TierContract):
    keeps = False

    @pytest.fixture
    def tier(self):
        self.pool = _Pool()
        return PoolTier(self.pool)

    def damage(self, tier, record):
        data = bytearray(self.pool.held[record])
        data[len(data) // 2] ^= 4
        self.pool.held[record] = bytes(data)
        return True

    def test_another_memory_under_the_record(self, tier):
        record = put_memory(tier, contract_memory(1))
        other = put_memory(tier, contract_memory(2))
        self.pool.held[record] = self.pool.held[other]
        with pytest.raises(Exception, match="another memory"):
            tier.get(record)


def test_a_remote_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    objects = Objects.open(
        "s3://bucket/x",
        retry_seconds=1.0,
        endpoint=f"http://127.0.0.1:{port}",
        access_key_id="a",
        secret_access_key="b",
        region="us-east-1",
        allow_http=True,
        timeout=2,
    )
    with pytest.raises(TierUnavailable):
        DepotTier(Depot(objects)).get("0" * 64)
