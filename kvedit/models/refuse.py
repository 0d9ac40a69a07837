"""Refusals by name, before anything runs: mechanisms that a KV memory can't stand for yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvedit.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["refuse_unsupported"]

# What transformers' cache would hold for a layer, by the name of its cache class.
_UNDERSTOOD = ("DynamicLayer", "DynamicSlidingWindowLayer")
_REASONS = {
    "LinearAttention": "linear attention or a state-space layer: its state is no list of slots",
    "Dummy": "a layer that shares another layer's KV, or has none",
    "Indexed": "sparse attention with an index over keys",
}


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raises if the model's configuration names a mechanism that is not understood.

    Raises:
        UnsupportedModel: names the mechanism and the model class.
    """
    name = type(model).__name__
    if name == "OptimizedModule" or getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModel("compiled models: pass the model that was given to torch.compile")
    if not hasattr(model, "config") or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModel(f"{name} is no transformers model (PreTrainedModel)")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModel(
            f"{name}: some weights are not in memory (offloaded, or on the meta device); load the "
            "model without offloading"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name}: encoder–decoder models; kvedit edits decoder-only models")
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModel(f"{name}: MLA, whose cache holds compressed latents, not keys")
    if getattr(config, "num_kv_shared_layers", None):
        # Older transformers give such layers an ordinary cache that is never filled.
        raise UnsupportedModel(f"{name}: layers that share another layer's KV")
    if getattr(config, "alibi", False) or getattr(
        getattr(config, "attn_config", None), "alibi", False
    ):
        raise UnsupportedModel(f"{name}: ALiBi, whose logits depend on the distance of slots")
    _refuse_layers(model, name)


def _refuse_layers(model: PreTrainedModel, name: str) -> None:
    from transformers import DynamicCache

    try:
        layers = DynamicCache(config=model.config).layers
    except Exception as error:
        raise UnsupportedModel(
            f"{name}: transformers has no attention cache for it ({error})"
        ) from error
    for index, layer in enumerate(layers):
        kind = type(layer).__name__
        if kind not in _UNDERSTOOD:
            reason = next((text for part, text in _REASONS.items() if part in kind), "unknown")
            raise UnsupportedModel(f"{name}, layer {index}: {reason} (transformers' {kind})")
