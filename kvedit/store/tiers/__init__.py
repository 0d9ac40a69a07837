"""Tiers: places for whole memories, from a device to a remote store, under one contract."""

from kvedit.store.tiers.base import Tier, TierUsage
from kvedit.store.tiers.depot import DepotTier
from kvedit.store.tiers.live import LiveTier
from kvedit.store.tiers.pool import Pool, PoolTier

__all__ = ["DepotTier", "LiveTier", "Pool", "PoolTier", "Tier", "TierUsage"]
