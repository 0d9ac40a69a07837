"""Cache steering: a delta's keys and values, added to chosen slots of a memory."""

from __future__ import annotations

from kvedit.editors.steering.edit import Steer
from kvedit.editors.steering.slots import At, check_own_positions, slot_masks

__all__ = ["At", "Steer", "check_own_positions", "slot_masks"]
