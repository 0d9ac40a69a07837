"""A session's row as a new memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvedit.memory import KVMemory, LayerKV, Lineage, LineageNode, Source
from kvedit.memory.digest import canonical_json, digest_tensor
from kvedit.memory.lineage import environment

if TYPE_CHECKING:
    from kvedit.runtime.session import Session

__all__ = ["grown_memory", "row_layers"]


def grown_memory(session: Session, row: int) -> KVMemory:
    """Returns row ``row`` of a session as a memory: its old slots, then one per new token."""
    base = session.memories[row]
    source = session.source(row)
    fed = session.cache.ids[row][session.cache.valid[row]].cpu()
    node = LineageNode(
        operation="grow",
        name="grow",
        version=1,
        parameters=canonical_json({"tokens": digest_tensor(fed)}).decode(),
        inputs=(base.lineage.head.id,) if base and base.lineage.head else (),
        reproducibility="reader",
        environment=environment(session.model.dtype),
    )
    parents = [base.lineage] if base else []
    return KVMemory(
        layers=row_layers(session, row, source),
        model=session.inspection.spec_now(),
        next_position=int(session.cache.next_positions[row]),
        source=source,
        lineage=Lineage.join(parents, node),
        rules=base.rules if base else (),
        verified=base.verified if base else True,
    )


def row_layers(session: Session, row: int, source: Source | None) -> dict[int, LayerKV]:
    """Returns copies of a row's valid slots, layer by layer."""
    cache, base = session.cache, session.memories[row]
    new = cache.valid[row]
    count = int(new.sum())
    first = (len(source) if source else 0) - count
    return {
        index: _row_layer(
            slots, row, new, cache.positions[row], first, base.layers[index] if base else None
        )
        for index, slots in enumerate(cache.layers)
    }


def _row_layer(
    slots: object,
    row: int,
    new: torch.Tensor,
    positions: torch.Tensor,
    first: int,
    base: LayerKV | None,
) -> LayerKV:
    held = base.slots if base is not None else 0
    keys, values = slots.states()  # type: ignore[attr-defined]
    padded: int = slots.held  # type: ignore[attr-defined]
    keep = torch.cat(
        (torch.arange(held, device=keys.device), padded + new.to(keys.device).nonzero().squeeze(1))
    )
    count = int(new.sum())
    fresh = torch.arange(first, first + count)
    old_source = base.source.cpu() if base is not None else torch.zeros(0, dtype=torch.int64)
    old_positions = base.positions.cpu() if base is not None else torch.zeros(0, dtype=torch.int64)
    bias = None
    if base is not None and base.bias is not None:
        bias = torch.cat((base.bias.cpu(), torch.zeros(base.bias.shape[0], count)), dim=1)
    return LayerKV(
        keys=keys[row].index_select(1, keep),
        values=values[row].index_select(1, keep),
        positions=torch.cat((old_positions, positions[new].cpu())),
        source=torch.cat((old_source, fresh)),
        bias=bias,
    )
