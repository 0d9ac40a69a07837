"""Replay: make a memory again from its lineage, and say how far it is from the stored one."""

from kvedit.editors.replaying.replay import rebuild, replay
from kvedit.editors.replaying.report import Deviation, ReplayReport, compare_replay

__all__ = ["Deviation", "ReplayReport", "compare_replay", "rebuild", "replay"]
