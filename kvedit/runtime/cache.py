"""MemoryCache: transformers' cache, filled from memories, that knows positions and bias.

It is passed as ``cache`` (``past_key_values`` before transformers 5.24). Per forward pass it is
told the positions of the new tokens (:meth:`MemoryCache.begin`), and it completes every attention
call with the layer's own mask, bias and rules. All of that lives here and not on the model, so
sessions on one model don't meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvedit.errors import ContextTooLong, InvalidArgument, UnsupportedModel
from kvedit.memory import KVMemory, ModelSpec
from kvedit.models.attention_call import AttentionCall, MaskRule
from kvedit.models.route import MARK
from kvedit.runtime.limits import check_switch
from kvedit.runtime.slots import LayerSlots
from kvedit.runtime.steered import Steered

__all__ = ["MemoryCache"]


class MemoryCache(Cache):
    """A batch of rows, each continuing its own memory (or none).

    Args:
        spec: the live model's facts.
        memories: one per row; None for a row that starts empty.
        limit: positions at which to stop, or None for no limit.

    Attributes:
        steered: bias and rules of the rows.
    """

    def __init__(
        self, spec: ModelSpec, memories: Sequence[KVMemory | None], limit: int | None = None
    ) -> None:
        """Lays out the rows; tensors are copied when the first tokens come."""
        layers = [
            LayerSlots(layer, [None if m is None else m.layers[index] for m in memories])
            for index, layer in enumerate(spec.layers)
        ]
        super().__init__(layers=layers)
        self.spec, self.limit = spec, limit
        starts = [0 if memory is None else memory.next_position for memory in memories]
        self.next_positions = torch.tensor(starts, dtype=torch.int64)
        rows = len(starts)
        self.positions = torch.zeros(rows, 0, dtype=torch.int64)
        self.valid = torch.zeros(rows, 0, dtype=torch.bool)
        self.ids = torch.zeros(rows, 0, dtype=torch.int64)
        self._open = 0
        self._start, self._uniform = 0, True
        self._awaiting: int | None = None
        self._masks: dict[tuple[int, int, bool], Any] = {}
        self._layouts = _group_layouts(layers)
        self.steered = Steered(spec, memories, layers)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.positions.shape[0]

    @property
    def fed(self) -> int:
        """New tokens per row since the start, padding included."""
        return self.positions.shape[1]

    def begin(self, ids: torch.Tensor | None, positions: torch.Tensor, valid: torch.Tensor) -> None:
        """Announces the new tokens of the forward pass that follows.

        Args:
            ids: ``[batch, query]`` token ids, or None where embeddings were passed.
            positions: ``[batch, query]`` RoPE positions.
            valid: ``[batch, query]`` bool; False for padding.

        Raises:
            InvalidArgument: if positions do not continue the rows.
            ContextTooLong: if they run past the model's limit, or to where its RoPE changes.
        """
        self.recover()
        self._check_positions(positions, valid)
        self.positions = torch.cat((self.positions.to(positions.device), positions), dim=1)
        self.valid = torch.cat((self.valid.to(valid.device), valid), dim=1)
        filler = torch.full_like(positions, -1) if ids is None else ids.to(positions.device)
        self.ids = torch.cat((self.ids.to(filler.device), filler), dim=1)
        counts = valid.sum(dim=1).to(self.next_positions.device)
        self.next_positions = self.next_positions + counts
        self._open = positions.shape[1]
        self._masks = {}
        starts = self.next_positions - counts
        self._start = int(starts.max())
        natural = self._start + torch.arange(self._open, device=positions.device)
        self._uniform = bool(((positions == natural) | ~valid).all())

    def recover(self) -> None:
        """Goes back to before a forward pass that died halfway, if one did."""
        if not self._open:
            return
        before = self.fed - self._open
        for layer in self.layers:
            layer.drop_last(max(0, layer.fed - before))
        self._forget(self._open)
        self._open, self._awaiting = 0, None

    def _check_positions(self, positions: torch.Tensor, valid: torch.Tensor) -> None:
        starts = self.next_positions.to(positions.device)
        expected = starts[:, None] + valid.cumsum(dim=1) - 1
        if bool(((positions != expected) & valid).any()):
            row = int(((positions != expected) & valid).any(dim=1).nonzero()[0])
            raise InvalidArgument(
                f"row {row}: new tokens must continue at position {int(starts[row])}, found "
                f"position_ids {positions[row][valid[row]].tolist()[:8]}; pass position_ids "
                "explicitly (a default of transformers counts slots, not positions)"
            )
        last = int((starts + valid.sum(dim=1)).max())
        if self.limit is not None and last > self.limit:
            raise ContextTooLong(
                f"{self.spec.name} has {self.limit} positions; these tokens would end at {last}"
            )
        check_switch(self.spec, int(starts.max()), last)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends a layer's new keys and values and returns all of its slots, marked."""
        if self._open != key_states.shape[2]:
            raise InvalidArgument(
                "this cache belongs to a kvedit session that is closed, or to another model; use "
                "it with the session's model inside `with kv.attach(...)`"
            )
        if self._awaiting is not None:
            self._unreached(self._awaiting)
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        setattr(keys, MARK, self)
        self._awaiting = layer_idx
        return keys, values

    def _unreached(self, layer: int) -> None:
        raise UnsupportedModel(
            f"layer {layer} took keys from the cache and did not pass them to the attention "
            "interface as they are; kvedit can't add its mask and bias there"
        )

    def complete(self, call: AttentionCall) -> AttentionCall:
        """Returns the call with this layer's mask, bias and rules.

        Without rules they have the form that its backend takes.

        Raises:
            UnsupportedModel: if the model brings a mask of its own making, or the backend can't
                carry this one.
        """
        slots = self.layers[call.layer]
        self._awaiting = None
        if not isinstance(call.mask, MaskRule):
            raise UnsupportedModel(
                f"layer {call.layer} got a mask that transformers' mask interface did not make"
            )
        mask, causal = self._mask(call.layer, slots, call.mask, call.query.shape[2])
        return self.steered.complete(call, slots, mask, causal)

    def end(self) -> None:
        """Ends the forward pass that :meth:`begin` announced.

        Raises:
            UnsupportedModel: if the last layer's attention never came by.
        """
        self._open = 0
        if self._awaiting is not None:
            self._unreached(self._awaiting)

    def _mask(
        self, layer: int, slots: LayerSlots, rule: MaskRule, queries: int
    ) -> tuple[torch.Tensor | None, bool]:
        key = (self._layouts[layer], slots.spec.window or 0, slots.spec.kind == "chunked")
        if key not in self._masks:
            self._masks[key] = self._build_mask(slots, rule, queries)
        found: tuple[torch.Tensor | None, bool] = self._masks[key]
        return found

    def _build_mask(
        self, slots: LayerSlots, rule: MaskRule, queries: int
    ) -> tuple[torch.Tensor | None, bool]:
        whole = slots.valid is None and bool(self.valid.all())
        if whole and slots.spec.window is None:
            if queries == 1:
                return None, False
            if slots.held == 0 and self.fed == queries:
                return None, True
        held = slots.positions
        mine, real = self.positions.to(held.device), self.valid.to(held.device)
        valid = torch.ones_like(held, dtype=torch.bool) if slots.valid is None else slots.valid
        at = torch.cat((held, mine), dim=1)
        seen = rule.allows(mine[:, -queries:], at)
        seen = seen & torch.cat((valid, real), dim=1)[:, None, None, :]
        if not whole:
            # A padded query sees something, since a softmax over nothing is NaN.
            seen = seen | ~real[:, -queries:][:, None, :, None]
        return (None, False) if bool(seen.all()) else (seen, False)

    def _forget(self, tokens: int) -> None:
        if tokens <= 0:
            return
        gone = self.valid[:, -tokens:].sum(dim=1).to(self.next_positions.device)
        self.next_positions = self.next_positions - gone
        self.positions, self.valid = self.positions[:, :-tokens], self.valid[:, :-tokens]
        self.ids = self.ids[:, :-tokens]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; a negative count, as transformers passes it.

        Raises:
            InvalidArgument: if there are fewer new tokens; a memory's own slots never go.
        """
        count = -tokens_to_remove
        if not 0 <= count <= self.fed:
            raise InvalidArgument(f"can't remove {count} of {self.fed} new tokens")
        for layer in self.layers:
            layer.drop_last(count)
        self._forget(count)

    def invalidate(self, row: int, start: int) -> None:
        """Makes new tokens from number ``start`` on invisible in one row (padding after an end)."""
        gone = int(self.valid[row, start:].sum())
        self.valid = self.valid.clone()
        self.valid[row, start:] = False
        self.next_positions = self.next_positions.clone()
        self.next_positions[row] -= gone

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more tokens, so that no layer has to be copied meanwhile."""
        for layer in self.layers:
            layer.reserve(layer.length + tokens)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Makes row ``rows[i]`` the i-th row, in every layer."""
        for layer in self.layers:
            layer.select_rows(rows)
        self.positions = self.positions[rows.to(self.positions.device)]
        self.valid = self.valid[rows.to(self.valid.device)]
        self.ids = self.ids[rows.to(self.ids.device)]
        self.next_positions = self.next_positions[rows.to(self.next_positions.device)]
        self._masks = {}
        self.steered.select_rows(rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders rows for beam search."""
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row, as beam search and several samples per prompt need."""
        self.select_rows(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows of ``indices``."""
        self.select_rows(indices)

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Returns slots of the longest layer; within a forward pass, the first new position.

        Between passes transformers asks in order to size an attention mask. Within one, a model
        asks where its new tokens stand: as a default for the position_ids that it was given, or,
        from within a layer, in earnest (Llama 4 scales queries by it).

        Raises:
            UnsupportedModel: if a layer asks for one position while rows stand at several.
        """
        if self._open == 0:
            return max(int(layer.length) for layer in self.layers)
        if layer_idx is not None and not self._uniform:
            raise UnsupportedModel(
                f"{self.spec.name} derives positions from the cache's length, so rows can't stand "
                "at different positions: use one memory and prompts of one length, or one row"
            )
        return self._start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Slots before the new tokens; only mask sizes come from this, and they are not used."""
        return int(self.layers[layer_idx].get_seq_length())


def _group_layouts(layers: list[LayerSlots]) -> list[int]:
    # Layers with equal memory slots share one mask per forward pass.
    seen: list[LayerSlots] = []
    groups = []
    for layer in layers:
        for number, other in enumerate(seen):
            if _same_layout(layer, other):
                groups.append(number)
                break
        else:
            groups.append(len(seen))
            seen.append(layer)
    return groups


def _same_layout(a: LayerSlots, b: LayerSlots) -> bool:
    same_validity = (a.valid is None) == (b.valid is None) and (
        a.valid is None or b.valid is None or torch.equal(a.valid, b.valid)
    )
    return same_validity and torch.equal(a.positions, b.positions)
