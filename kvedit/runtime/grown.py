"""A session's row as a new memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from kvedit.memory import KVMemory, LayerKV, Lineage, LineageNode, Source
from kvedit.memory.digest import canonical_json, digest_tensor
from kvedit.memory.lineage import environment
from kvedit.runtime.slots import LayerSlots

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
        inputs=_inputs(base),
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


def _inputs(base: KVMemory | None) -> tuple[str, ...]:
    if base is None:
        return ()
    # A memory without history is named by what is in it.
    return (base.lineage.head.id if base.lineage.head else base.digest,)


def row_layers(
    session: Session, row: int, source: Source | None, final: bool = False
) -> dict[int, LayerKV]:
    """Returns a row's valid slots, layer by layer, as copies.

    Args:
        session: the session.
        row: row of its batch.
        source: the row's tokens.
        final: whether the session ends here, so that a buffer may be handed over uncopied.
    """
    cache, base = session.cache, session.memories[row]
    new = cache.valid[row]
    made = (cache.ids[row][new] >= 0).cpu()  # embeddings have no token
    first = (len(source) if source else 0) - int(made.sum())
    fresh = {
        "positions": cache.positions[row][new].cpu(),
        "source": torch.where(made, first + made.cumsum(dim=0) - 1, -1),
    }
    return {
        index: _row_layer(slots, row, new, base.layers[index] if base else None, fresh, final)
        for index, slots in enumerate(cache.layers)
    }


def _row_layer(
    slots: LayerSlots,
    row: int,
    new: torch.Tensor,
    base: LayerKV | None,
    fresh: dict[str, torch.Tensor],
    final: bool,
) -> LayerKV:
    keys, values = slots.states()
    held = 0 if base is None else base.slots
    old = torch.arange(held, device=keys.device)
    keep = torch.cat((old, slots.held + new.to(keys.device).nonzero().squeeze(1)))
    if final and slots.full and len(keep) == slots.length:
        kept = {"keys": keys[row], "values": values[row]}
    else:
        states = {"keys": keys, "values": values}
        kept = {name: state[row].index_select(1, keep) for name, state in states.items()}
    if base is None:
        return LayerKV(**kept, **fresh)
    grown = {name: torch.cat((getattr(base, name).cpu(), fresh[name])) for name in fresh}
    bias = None if base.bias is None else pad(base.bias.cpu(), (0, int(new.sum())))
    return LayerKV(**kept, **grown, bias=bias)
