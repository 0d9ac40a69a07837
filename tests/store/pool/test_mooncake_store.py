"""A Mooncake pool as a tier: the contract, and a store that goes on without it."""

import warnings

import pytest

from kvedit.store import Store
from kvedit.store.tiers import PoolTier
from kvedit.testing.tier_contract import TierContract, contract_memory


class TestMooncake(TierContract):
    keeps = False

    @pytest.fixture
    def tier(self, master, join, request):
        return PoolTier(join(master, namespace=request.node.name[:60]))

    def test_it_does_keep_here(self, tier):
        from kvedit.testing.tier_contract import put_memory

        memory = contract_memory(1)
        assert tier.get(put_memory(tier, memory)).digest == memory.digest


def test_a_store_reads_from_the_pool_what_its_folder_lacks(master, join, tmp_path):
    remote = f"file://{tmp_path / 'remote'}"
    (tmp_path / "remote").mkdir()
    memory = contract_memory(1)
    one = Store(tmp_path / "a", "process", remote=remote, pool=join(master, namespace="shared"))
    one.put(memory, "m")
    two = Store(tmp_path / "b", "process", remote=remote, pool=join(master, namespace="shared"))
    two.pull("m", eager=False)
    assert two.get("m").digest == memory.digest
    assert two.stats().local == 0 and two.counters.fetched == 0  # from the pool, not the remote


def test_a_master_that_dies_costs_nothing(fragile, join, tmp_path):
    store = Store(tmp_path / "a", "process", pool=join(fragile, seconds=10))
    store.put(contract_memory(1), "m")
    fragile.kill()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store.put(contract_memory(2), "n")
    assert store.get("m").digest == contract_memory(1).digest
    assert store.get("n").digest == contract_memory(2).digest
