"""Compaction by selection: fewer slots, each exactly as it was. No gradients, no fitting."""

from __future__ import annotations

from kvedit.editors.compacting.compaction import Compaction
from kvedit.editors.compacting.expectedattention import ExpectedAttention
from kvedit.editors.compacting.keydiff import KeyDiff
from kvedit.editors.compacting.knorm import Knorm
from kvedit.editors.compacting.kvzip import KVZip
from kvedit.editors.compacting.randomkeep import RandomKeep
from kvedit.editors.compacting.snapkv import SnapKV
from kvedit.editors.compacting.streamingllm import StreamingLLM
from kvedit.editors.compacting.tova import TOVA
from kvedit.editors.compacting.truncate import Truncate

__all__ = [
    "TOVA",
    "Compaction",
    "ExpectedAttention",
    "KVZip",
    "KeyDiff",
    "Knorm",
    "RandomKeep",
    "SnapKV",
    "StreamingLLM",
    "Truncate",
]
