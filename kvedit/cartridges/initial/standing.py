"""stand_for: a start of other tokens takes on the source of the context that it shall stand for."""

from __future__ import annotations

import dataclasses

import torch

from kvedit.errors import IncompatibleModel
from kvedit.memory import KVMemory, Lineage, LineageNode
from kvedit.memory.lineage import environment

__all__ = ["stand_for"]


def stand_for(start: KVMemory, context: KVMemory) -> KVMemory:
    """Returns ``start`` with the source of ``context``, so that it is continued like it.

    A prompt is encoded as the turn or text that follows the source: after this, questions to the
    cartridge are the tokens that questions to the context would be. No slot names a token.

    Args:
        start: keys and values of anything: random vectors, a summary, chunks.
        context: the memory of what the cartridge shall stand for.

    Raises:
        IncompatibleModel: if they are of different models.
    """
    different = start.model.fingerprint.differences(context.model.fingerprint)
    if different:
        raise IncompatibleModel(
            f"the start is of {start.model.name} and the context of {context.model.name}: "
            f"{', '.join(different)} differ"
        )
    layers = {
        index: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
        for index, layer in start.layers.items()
    }
    inputs = (start, context)
    node = LineageNode(
        operation="start",
        name="stand_for",
        version=1,
        parameters="{}",
        inputs=tuple(m.lineage.head.id if m.lineage.head else m.digest for m in inputs),
        environment=environment(start.dtype),
    )
    lineage = Lineage.join([memory.lineage for memory in inputs], node)
    return dataclasses.replace(start, layers=layers, source=context.source, lineage=lineage)
