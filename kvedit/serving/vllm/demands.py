"""Demands: what an engine's configuration must be for memories to be served right, or not at all.

Each is refused at start, by name, before a request could be answered wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvedit.errors import UnsupportedModel

__all__ = ["check_engine"]


def check_engine(config: Any, cache: Any) -> None:
    """Refuses an engine with everything that stands in the way.

    Args:
        config: vLLM's ``VllmConfig``.
        cache: vLLM's ``KVCacheConfig``.

    Raises:
        UnsupportedModel: if there is anything.
    """
    reasons = [*_transfer(config), *_parallel(config), *_model(config), *_layers(cache)]
    if reasons:
        raise UnsupportedModel("kvedit can't serve memories here: " + "; ".join(reasons))


def _transfer(config: Any) -> Iterator[str]:
    transfer = config.kv_transfer_config
    if transfer.kv_role != "kv_consumer":
        yield f"kv_role is {transfer.kv_role}: expected kv_consumer, memories are only read"
    if transfer.kv_load_failure_policy != "fail":
        yield (
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy}: expected fail, since "
            "what would be recomputed are placeholders"
        )


def _parallel(config: Any) -> Iterator[str]:
    names = (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
    )
    for name in names:
        if (size := getattr(config.parallel_config, name, 1)) != 1:
            yield f"{name} is {size}: not tested, use 1 (several servers share a store)"
    if config.speculative_config is not None:
        yield "speculative decoding: a draft model has no such memory"
    if config.use_v2_model_runner:
        yield "Model Runner V2: not tested, set VLLM_USE_V2_MODEL_RUNNER=0"


def _model(config: Any) -> Iterator[str]:
    model = config.model_config
    if model.hf_overrides:
        yield "hf_overrides: the model is no longer that of its files"
    if config.load_config.load_format == "dummy":
        yield "load_format is dummy: the weights are not those of the files"
    own = getattr(model.hf_config, "quantization_config", None)
    if model.quantization is not None and own is None:
        yield f"quantization is {model.quantization}: the weights are not those of the files"
    if model.use_mla:
        yield "multi-head latent attention: the cache holds latents, not keys and values"
    kind = config.cache_config.cache_dtype
    if kind not in ("auto", str(model.dtype).removeprefix("torch.")):
        yield f"kv_cache_dtype is {kind}: use auto, a quantised cache changes the memory"


def _layers(cache: Any) -> Iterator[str]:
    groups = cache.kv_cache_groups
    if len(groups) != 1:
        yield f"{len(groups)} groups of cache layers: only models with one kind of attention"
        return
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ != "FullAttentionSpec":
        yield f"layers of kind {type(spec).__name__}: only FullAttentionSpec is served"
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, name, None):
            yield f"layers with {name} {getattr(spec, name)}: only layers that see everything"
