"""The noun: KVMemory and its parts. Knows neither transformers nor the store."""

from kvedit.memory.compare import Comparison, compare
from kvedit.memory.delta import Delta
from kvedit.memory.heads import HeadSet
from kvedit.memory.layer import LayerKV
from kvedit.memory.lineage import Lineage, LineageNode
from kvedit.memory.memory import KVMemory, Servable
from kvedit.memory.source import ChatState, Message, Source
from kvedit.memory.span import Span, SpanQuery
from kvedit.memory.spec import Fingerprint, LayerSpec, ModelSpec, RopeSpec

__all__ = [
    "ChatState",
    "Comparison",
    "Delta",
    "Fingerprint",
    "HeadSet",
    "KVMemory",
    "LayerKV",
    "LayerSpec",
    "Lineage",
    "LineageNode",
    "Message",
    "ModelSpec",
    "RopeSpec",
    "Servable",
    "Source",
    "Span",
    "SpanQuery",
    "compare",
]
