"""TierContract: what every tier must do; inherit it and say how to make the tier."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from kvedit.errors import KVEditError
from kvedit.memory import KVMemory, LayerKV, LayerSpec, Lineage, LineageNode, ModelSpec, RopeSpec
from kvedit.memory.digest import digest_bytes
from kvedit.memory.spec import Fingerprint
from kvedit.store.manifest import encode_manifest
from kvedit.store.tiers import Tier

__all__ = ["TierContract", "contract_memory", "put_memory"]


def contract_memory(
    seed: int = 0, slots: int = 300, dtype: torch.dtype = torch.float32, bias: bool = False
) -> KVMemory:
    """Returns a small memory of random tensors; equal seeds give equal memories.

    Args:
        seed: of the numbers.
        slots: of each of its two layers.
        dtype: of keys and values.
        bias: whether its first layer has a bias.
    """
    draw = torch.Generator().manual_seed(seed)
    rope = RopeSpec("default", tuple(1e4 ** (-i / 8) for i in range(4)), 1.0, "half")
    spec = LayerSpec("full", 4, 2, 8, 8, 8**-0.5, rope=rope)
    prints = Fingerprint(config="c" * 64, weights="w" * 64, tokenizer="t" * 64)
    model = ModelSpec("llama", "contract", (spec,) * 2, "rope", 2048, 1000, prints)
    slot = torch.arange(slots)
    nowhere = torch.full((slots,), -1)
    layers = {
        index: LayerKV(
            torch.randn(2, slots, 8, generator=draw).to(dtype),
            torch.randn(2, slots, 8, generator=draw).to(dtype),
            slot,
            nowhere,
            torch.randn(4, slots, generator=draw) if bias and index == 0 else None,
        )
        for index in range(2)
    }
    node = LineageNode("capture", "contract", 1, f'{{"seed":{seed}}}')
    return KVMemory(layers, model, max(slots, 1), lineage=Lineage((node,)))


def put_memory(tier: Tier, memory: KVMemory) -> str:
    """Returns the record digest under which it put a memory into a tier."""
    paper, _ = encode_manifest(memory, memory.cut())
    record = digest_bytes(paper)
    tier.put(record, memory, paper)
    return record


class TierContract:
    """Tests that a tier inherits. A subclass has a fixture ``tier`` and, where it can, ``damage``.

    Attributes:
        keeps: whether the tier keeps all of what fits; a pool may lose anything.
    """

    keeps = True

    @pytest.fixture
    def tier(self) -> Tier:
        """Returns an empty tier.

        Raises:
            NotImplementedError: unless a subclass makes one.
        """
        raise NotImplementedError("a subclass yields its tier")

    def damage(self, tier: Any, record: str) -> bool:
        """Returns whether it changed a stored byte of a record behind the tier's back."""
        return False

    def same(self, found: KVMemory | None, memory: KVMemory) -> None:
        """Asserts that a tier gave the memory back, or has none where it may."""
        if found is None:
            assert not self.keeps
            return
        assert found.digest == memory.digest
        assert found.lineage == memory.lineage
        for index, layer in memory.layers.items():
            for kind, tensor in layer.tensors():
                other = dict(found.layers[index].tensors())[kind].cpu()
                assert torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)), kind

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
    def test_it_returns_the_bits(self, tier: Tier, dtype: torch.dtype) -> None:
        """What comes out is what went in."""
        memory = contract_memory(1, dtype=dtype, bias=True)
        self.same(tier.get(put_memory(tier, memory)), memory)

    @pytest.mark.parametrize("slots", [0, 1, 256, 257])
    def test_any_size(self, tier: Tier, slots: int) -> None:
        """Empty layers and block borders too."""
        memory = contract_memory(2, slots)
        self.same(tier.get(put_memory(tier, memory)), memory)

    def test_what_is_not_there(self, tier: Tier) -> None:
        """No error, no memory."""
        assert tier.get("0" * 64) is None
        assert "0" * 64 not in tier
        tier.discard("0" * 64)

    def test_putting_again_changes_nothing(self, tier: Tier) -> None:
        """The same record twice is there once."""
        memory = contract_memory(3)
        record = put_memory(tier, memory)
        assert put_memory(tier, memory) == record
        assert tier.records().count(record) == (1 if self.keeps else tier.records().count(record))
        self.same(tier.get(record), memory)

    def test_an_edit_over_the_same_tokens_is_another_memory(self, tier: Tier) -> None:
        """An edited memory never comes back as its base, nor its base as the edit."""
        base = contract_memory(4)
        edited = base.with_layers({0: base.layers[0].add_bias(torch.ones(4, 300))})
        other = dataclasses.replace(base, lineage=Lineage())
        records = [put_memory(tier, memory) for memory in (base, edited, other)]
        assert len(set(records)) == 3
        for record, memory in zip(records, (base, edited, other), strict=True):
            self.same(tier.get(record), memory)

    def test_discard(self, tier: Tier) -> None:
        """What was discarded is gone, and its neighbour is not."""
        first, second = contract_memory(5), contract_memory(6)
        records = [put_memory(tier, memory) for memory in (first, second)]
        tier.discard(records[0])
        assert tier.get(records[0]) is None
        assert records[0] not in tier.records()
        self.same(tier.get(records[1]), second)

    def test_usage(self, tier: Tier) -> None:
        """It counts what it holds."""
        record = put_memory(tier, contract_memory(7))
        if self.keeps:
            usage = tier.usage()
            assert usage.records == 1
            assert usage.bytes > 0
            assert tier.records() == [record]
            assert record in tier

    def test_damage_is_found(self, tier: Tier) -> None:
        """A changed byte never comes out as a memory."""
        memory = contract_memory(8)
        record = put_memory(tier, memory)
        if not self.damage(tier, record):
            pytest.skip("nothing of this tier can be damaged from outside")
        try:
            found = tier.get(record)
        except KVEditError:
            return
        assert found is None

    def test_threads(self, tier: Tier) -> None:
        """Many at once, each gets its own."""
        memories = [contract_memory(seed, 20) for seed in range(10, 18)]
        with ThreadPoolExecutor(4) as pool:
            records = list(pool.map(lambda memory: put_memory(tier, memory), memories))
            for found, memory in zip(pool.map(tier.get, records), memories, strict=True):
                self.same(found, memory)
