"""PackedCache: a prefix and a batch of packed rows behind transformers' cache interface.

Where the runtime's :class:`~kvedit.runtime.cache.MemoryCache` copies a memory into a buffer that
grows, this cache keeps nothing: every layer is handed prefix and new tokens in one tensor, through
which the gradient flows back to the prefix. It marks its keys, so the attention interface asks it
for masks, which come from the model's own rule evaluated at RoPE positions.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import repeat
from transformers.cache_utils import Cache, CacheLayerMixin

from kvedit.cartridges.packed_mask import PackedMask
from kvedit.cartridges.packing import Batch
from kvedit.cartridges.prefix import LayerStates, Prefix, padded_bias
from kvedit.errors import UnsupportedModel
from kvedit.memory import ModelSpec
from kvedit.models.attention_call import AttentionCall, MaskRule
from kvedit.models.route import MARK
from kvedit.runtime.finish import finish

__all__ = ["PackedCache"]


class _PrefixLayer(CacheLayerMixin):
    """One layer's prefix, as transformers asks a layer of a cache."""

    is_sliding = False

    def __init__(self, states: LayerStates) -> None:
        super().__init__()
        self.states = states

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to prepare."""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the prefix and the new tokens ``[batch, head, slot, dim]``; keeps neither."""
        held = (self.states.keys, self.states.values)
        pairs = zip(held, (key_states, value_states), strict=True)
        keys, values = (torch.cat((_rows(old, new), new), dim=2) for old, new in pairs)
        return keys, values

    def get_seq_length(self) -> int:
        """Slots of the prefix."""
        return self.states.slots

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots after ``query_length`` more, and the offset of the first."""
        return self.states.slots + query_length, 0


class PackedCache(Cache):
    """What one forward pass of a batch sees: made for the pass, and used up by it.

    Args:
        spec: the live model's facts.
        prefix: what all tokens of the batch see.
        batch: the packed rows, on the model's device.
    """

    def __init__(self, spec: ModelSpec, prefix: Prefix, batch: Batch) -> None:
        """Notes the parts; no tensor is copied."""
        super().__init__(layers=[_PrefixLayer(states) for states in prefix.layers])
        self.spec, self.prefix = spec, prefix
        self.mask = PackedMask(batch.segments, batch.offsets + prefix.next_position)
        self._packed = bool((batch.segments > 0).any())
        self._awaiting: int | None = None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a layer's prefix and new tokens, marked."""
        if self._awaiting is not None:
            self._unreached(self._awaiting)
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        setattr(keys, MARK, self)
        self._awaiting = layer_idx
        return keys, values

    def complete(self, call: AttentionCall) -> AttentionCall:
        """Returns the call with this layer's mask and bias, in the form that its backend takes.

        Raises:
            UnsupportedModel: if the model brings a mask of its own making, or the backend takes
                no mask.
        """
        self._awaiting = None
        if not isinstance(call.mask, MaskRule):
            raise UnsupportedModel(
                f"layer {call.layer} got a mask that transformers' mask interface did not make"
            )
        states, spec = self.prefix.layers[call.layer], self.spec.layers[call.layer]
        bias = padded_bias(states, call.query.shape[2], call.query)
        if call.backend == "flex" and bias is None:
            return self.mask.as_block_mask(call, call.mask, states, spec)
        seen = self.mask.seen(call.mask, states, spec)
        return finish(call, seen, causal=False, bias=bias)

    def end(self) -> None:
        """Ends the pass.

        Raises:
            UnsupportedModel: if the last layer's attention never came by.
        """
        if self._awaiting is not None:
            self._unreached(self._awaiting)

    def _unreached(self, layer: int) -> None:
        raise UnsupportedModel(
            f"layer {layer} took keys from the cache and did not pass them to the attention "
            "interface as they are; kvedit can't add its mask and bias there"
        )

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Returns the position at which samples begin.

        Raises:
            UnsupportedModel: if a layer asks: it would take one position for all packed samples
                (Llama 4 scales queries by it).
        """
        if layer_idx is not None and self._packed:
            raise UnsupportedModel(
                f"{self.spec.name} derives positions from the cache's length, so samples can't be "
                "packed: give each its own row (pack=1)"
            )
        return self.prefix.next_position

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Slots before the new tokens; only mask sizes come from this, and they are not used."""
        return int(self.layers[layer_idx].get_seq_length())


def _rows(states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    # In the dtype and on the device of what the layer computed: parameters are wider, and under
    # device_map each layer has its own device.
    return repeat(states.to(new), "head slot dim -> batch head slot dim", batch=new.shape[0])
