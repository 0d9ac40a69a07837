"""Hot pools of bytes that several machines share: never the only copy of anything."""

from kvedit.store.pool.config import MooncakeConfig
from kvedit.store.pool.mooncake import MooncakePool
from kvedit.store.pool.values import PoolUsage

__all__ = ["MooncakeConfig", "MooncakePool", "PoolUsage"]
