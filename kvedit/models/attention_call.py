"""AttentionCall: one layer's attention, about to be computed, and how each backend computes it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from einops import rearrange

from kvedit.errors import UnsupportedModel

__all__ = [
    "BACKENDS",
    "Adjustment",
    "AttentionCall",
    "MaskRule",
    "Observer",
    "Output",
    "without_bias",
]

# Our names for the backends. Flash gets a name without "flash", since transformers derives masks
# and padding from that word, and the marked path hands its kernel no mask at all.
BACKENDS = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flex": "flex_attention",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "fa4": "flash_attention_4",
}

Output = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class MaskRule:
    """What transformers would have turned into a mask tensor.

    Args:
        rule: ``rule(batch, head, query_index, key_index) -> bool tensor``, broadcasting.
        arguments: all arguments of the mask call, to build the tensor if it is needed.
    """

    rule: Callable[..., torch.Tensor]
    arguments: dict[str, Any]

    def allows(self, queries: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Returns which slots a query may see by position.

        Args:
            queries: ``[batch, query]`` RoPE positions.
            slots: ``[batch, slot]`` RoPE positions.

        Returns:
            Bool ``[batch, 1, query, slot]``.

        Raises:
            UnsupportedModel: if the model adds a rule that is not a function of positions.
        """
        if self.arguments.get("use_vmap"):
            raise UnsupportedModel(
                "this model's attention mask is no function of positions (it was given an overlay "
                "rule, as image or prefix tokens need); kvedit can't place memories under it"
            )
        batch = torch.arange(queries.shape[0], device=queries.device)[:, None, None, None]
        head = torch.zeros(1, dtype=torch.int64, device=queries.device)[None, :, None, None]
        seen = self.rule(batch, head, queries[:, None, :, None], slots[:, None, None, :])
        return seen.expand(queries.shape[0], 1, queries.shape[1], slots.shape[1])

    def build(self, backend: str) -> Any:
        """Returns the mask that the backend would have been given by transformers."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        return ALL_MASK_ATTENTION_FUNCTIONS[BACKENDS[backend]](**self.arguments)


class Adjustment(Protocol):
    """What changes logits by more than a static bias; logits are then computed explicitly."""

    def products(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns scaled query-key products, as they go into softcap, masks and bias.

        Args:
            scores: ``[batch, query_head, query, slot]``.
        """
        ...

    def logits(self, scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """Returns logits as they go into the softmax.

        Args:
            scores: ``[batch, query_head, query, slot]``; -inf where a slot is not seen.
            sinks: ``[query_head]`` logits of the layer's sinks, or None.
        """
        ...


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One layer's attention, about to be computed.

    Args:
        module: the attention module.
        backend: key of ``BACKENDS``.
        query: ``[batch, query_head, query, dim]``, post-RoPE.
        key: ``[batch, head, slot, dim]``, post-RoPE, memory and new tokens.
        value: ``[batch, head, slot, dim]``.
        mask: None, a :class:`MaskRule`, or a tensor (bool, or additive float) that broadcasts to
            ``[batch, query_head, query, slot]``.
        causal: whether a mask of None means a causal square; otherwise it means all of it.
        scaling: factor on query-key products.
        options: whatever else the model passed.
        bias: float ``[batch or 1, query_head, 1, slot]`` not yet in ``mask``, for backends that
            take it by other means; else None.
        adjust: run-time rules; attention is then computed explicitly, whatever the backend.
    """

    module: torch.nn.Module
    backend: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    causal: bool
    scaling: float | None
    options: dict[str, Any] = field(default_factory=dict)
    bias: torch.Tensor | None = None
    adjust: Adjustment | None = None

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @property
    def scale(self) -> float:
        """The scaling in force: the given one, or ``dim ** -0.5``."""
        return self.query.shape[-1] ** -0.5 if self.scaling is None else float(self.scaling)

    def run(self) -> Output:
        """Computes attention by the chosen backend."""
        mask = self.mask.build(self.backend) if isinstance(self.mask, MaskRule) else self.mask
        options = dict(self.options)
        if self.backend == "sdpa":
            options["is_causal"] = self.causal
        return _backend(self.backend, self.module)(
            self.module, self.query, self.key, self.value, mask, scaling=self.scaling, **options
        )


class Observer(Protocol):
    """Something that looks at attention calls, and may replace them."""

    def around(self, call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
        """Returns the output of ``call``; must call ``run`` exactly once unless it replaces it."""
        ...


def without_bias(call: AttentionCall, **changes: Any) -> AttentionCall:
    """Returns the call with its separate bias dropped and other fields changed."""
    return replace(call, bias=None, **changes)


def _backend(backend: str, module: torch.nn.Module) -> Callable[..., Output]:
    if backend == "eager":
        # Every modeling file that follows the interface has its own eager function: it knows the
        # family's softcap and sinks.
        found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if found is None:
            raise UnsupportedModel(
                f"{type(module).__name__} has no eager_attention_forward beside it; "
                "choose another attention implementation"
            )
        return found  # type: ignore[no-any-return]
    if backend.startswith("fa"):
        return partial(_flash, BACKENDS[backend])
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[BACKENDS[backend]]  # type: ignore[no-any-return]


def _flash(
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> Output:
    # transformers' own wrapper reads the implementation's name from the config, where ours stands
    # while the model is routed; so its inner function is called with the real name.
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    known = ("dropout", "sliding_window", "softcap", "s_aux")
    given = {key: options[key] for key in known if options.get(key) is not None}
    output = _flash_attention_forward(
        *(rearrange(x, "batch head slot dim -> batch slot head dim") for x in (query, key, value)),
        mask,
        query_length=query.shape[2],
        is_causal=bool(getattr(module, "is_causal", True)),
        softmax_scale=options.get("scaling"),
        attn_implementation=name,
        **given,
    )
    return output, None
