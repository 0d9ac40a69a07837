"""Watch a model attend to single tokens, and read off what it does with positions.

A single token sees only itself, so its hidden states do not depend on its position unless the
model adds absolute position embeddings. The same token at several positions therefore has keys
that differ by the layer's rotation alone. That tells rotation, NoPE and absolute positions apart
for every family, and no module path is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import UnsupportedModel
from kvedit.models.attention_call import AttentionCall, MaskRule, Output
from kvedit.models.cache_argument import cache_argument
from kvedit.models.route import observing, routed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PROBE_POSITIONS", "LayerObservation", "observe"]

PROBE_POSITIONS = (0, 1, 2, 5, 11, 23)
"""Positions at which one token is shown; small, so that every model has them and half precision
still tells the angles apart."""

_FAR = 1 << 20


@dataclass(frozen=True, eq=False)
class LayerObservation:
    """What one layer did with one token at ``PROBE_POSITIONS``.

    Args:
        module: the attention module.
        keys: ``[position, head, dim]``, as attention read them.
        values: ``[position, head, dim]``.
        query_heads: number of query heads.
        dtype: dtype of the keys before they were widened to float32.
        scale: factor on query-key products.
        softcap: cap on logits, or None.
        sinks: whether a sink logit was passed.
        rule: the mask rule that transformers made for the layer.
    """

    module: torch.nn.Module
    keys: torch.Tensor
    values: torch.Tensor
    query_heads: int
    dtype: torch.dtype
    scale: float
    softcap: float | None
    sinks: bool
    rule: MaskRule

    def window(self) -> tuple[str, int | None]:
        """Returns ("full", None), ("sliding", W) or ("chunked", C), by asking the mask rule.

        A query sees the W positions up to its own if that number is the same for every query, and
        C-chunks if it grows from 1 to C and starts again.
        """
        reach = [self._reach(_FAR + step) for step in range(2)]
        if reach[0] > _FAR:
            return "full", None
        if reach[0] == reach[1]:
            return "sliding", reach[0]
        start = _FAR + 1 - reach[0]
        size = 1
        while self._sees(start + size, size):
            size *= 2
        low, high = size // 2, size
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._sees(start + middle, middle) else (low, middle)
        return "chunked", high

    def _reach(self, query: int) -> int:
        # The farthest distance that is seen, plus one; visibility is monotone in distance.
        low, high = 0, query
        if self._sees(query, query):
            return query + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._sees(query, middle) else (low, middle)
        return low + 1

    def _sees(self, query: int, distance: int) -> bool:
        at = torch.tensor([[query]]), torch.tensor([[query - distance]])
        return bool(self.rule.allows(*at))


@dataclass(eq=False)
class _Watcher:
    layers: dict[int, LayerObservation] = field(default_factory=dict)

    def around(self, call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
        if not isinstance(call.mask, MaskRule):
            raise UnsupportedModel(
                f"{type(call.module).__name__} builds its own attention mask; kvedit can't tell "
                "which positions it lets a token see"
            )
        self.layers[call.layer] = LayerObservation(
            module=call.module,
            keys=call.key[:, :, -1].detach().float().cpu(),
            values=call.value[:, :, -1].detach().float().cpu(),
            query_heads=call.query.shape[1],
            dtype=call.key.dtype,
            scale=call.scale,
            softcap=call.options.get("softcap"),
            sinks=call.options.get("s_aux") is not None,
            rule=call.mask,
        )
        return run(call)


def observe(model: PreTrainedModel) -> dict[int, LayerObservation]:
    """Returns what each layer did when the model was shown one token at several positions.

    Raises:
        UnsupportedModel: if attention does not go through transformers' attention interface.
    """
    from transformers import DynamicCache

    watcher = _Watcher()
    count = len(PROBE_POSITIONS)
    ids = torch.full((count, 1), _probe_token(model), device=model.device)
    positions = torch.tensor(PROBE_POSITIONS, device=model.device)[:, None]
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": positions,
        cache_argument(model): DynamicCache(config=model.config),
        "use_cache": True,
    }
    with routed(model), observing(watcher), torch.no_grad():
        model(**arguments)
    if not watcher.layers:
        raise UnsupportedModel(
            f"{type(model).__name__}: no layer called transformers' attention interface"
        )
    return dict(sorted(watcher.layers.items()))


def _probe_token(model: PreTrainedModel) -> int:
    # Any ordinary token will do; padding is avoided since its embedding may be zero.
    config = model.config.get_text_config(decoder=True)
    special = {config.pad_token_id, config.bos_token_id, config.eos_token_id}
    return next(token for token in range(7, 64) if token not in special)
