"""Which tiny models there are: sizes, options and RoPE types of each family, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

__all__ = ["FAMILIES", "REFUSED", "ROPE_TYPES", "TinyFamily"]

ROPE_TYPES: tuple[str, ...] = (
    "default",
    "linear",
    "dynamic",
    "yarn",
    "longrope",
    "llama3",
    "proportional",
)
"""Every RoPE type of transformers' `ROPE_INIT_FUNCTIONS`, and `default`."""

# `proportional` rotates the whole head with some frequencies at zero: code that slices the rotated
# part out of a head can't take it.
_SLICED = ROPE_TYPES[:-1]

SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"


@dataclass(frozen=True)
class TinyFamily:
    """How one family is made small. It says nothing about how kvedit treats the family.

    Args:
        config: name of the configuration class in transformers.
        note: what makes the family worth testing, or why kvedit refuses it.
        options: what it needs beyond the sizes that all families share.
        head_dim: width of one attention head, where the configuration lets us choose it.
        partial: fraction in (0, 1] of a head that RoPE rotates.
        ropes: RoPE types that the family takes; empty where it has no RoPE.
        rope: the RoPE type it has unless told otherwise.
        local_theta: RoPE base of the sliding layers, where they have their own.
        embedding_std: standard deviation of the token embeddings, before the family's own scale.
        auto: the transformers class that builds it.
    """

    config: str
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    head_dim: int = 16
    partial: float = 1.0
    ropes: tuple[str, ...] = ROPE_TYPES
    rope: str = "default"
    local_theta: float | None = None
    embedding_std: float = 0.5
    auto: str = "AutoModelForCausalLM"


def _windowed(window: int, *full: int, layers: int = 4) -> dict[str, Any]:
    """Returns options for `layers` layers that slide over `window` slots, except those in full."""
    kinds = [FULL if layer in full else SLIDING for layer in range(layers)]
    return {"num_hidden_layers": layers, "sliding_window": window, "layer_types": kinds}


_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT_SIZES = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024, **_NO_DROPOUT}
_MOE = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}

FAMILIES: Mapping[str, TinyFamily] = MappingProxyType(
    {
        "llama": TinyFamily("LlamaConfig", "the plain case"),
        "qwen2": TinyFamily(
            "Qwen2Config",
            "biases on queries, keys and values; tied embeddings",
            {"tie_word_embeddings": True},
            embedding_std=0.3,
        ),
        "qwen3": TinyFamily("Qwen3Config", "QK norm; heads wider than hidden/heads", head_dim=32),
        "mistral": TinyFamily("MistralConfig", "all layers slide", {"sliding_window": 8}),
        "gemma2": TinyFamily(
            "Gemma2Config",
            "softcap, sliding and full layers, heads narrower than hidden/heads",
            {**_windowed(8, 1, 3), "hidden_size": 96, "query_pre_attn_scalar": 16},
            embedding_std=0.05,
        ),
        "gemma3": TinyFamily(
            "Gemma3TextConfig",
            "sliding and full layers with a RoPE base each",
            {**_windowed(8, 2), "query_pre_attn_scalar": 16},
            local_theta=1_000.0,
            embedding_std=0.06,
        ),
        "phi3": TinyFamily(
            "Phi3Config",
            "fused QKV; half of each head rotates",
            {"original_max_position_embeddings": 64},
            partial=0.5,
            ropes=("default", "longrope"),
        ),
        "gpt_neox": TinyFamily(
            "GPTNeoXConfig",
            "quarter rotary, fused QKV, parallel block",
            {"num_hidden_layers": 4},
            partial=0.25,
            ropes=_SLICED,
            embedding_std=0.3,
        ),
        "gpt2": TinyFamily("GPT2Config", "learned positions", _GPT_SIZES, ropes=()),
        "opt": TinyFamily(
            "OPTConfig",
            "learned positions with an offset",
            {
                "ffn_dim": 128,
                "word_embed_proj_dim": 64,
                "max_position_embeddings": 1024,
                "dropout": 0.0,
            },
            ropes=(),
        ),
        "cohere2": TinyFamily(
            "Cohere2Config",
            "sliding layers rotate, the full one does not; parallel block",
            {**_windowed(8, 2), "logit_scale": 0.8},
        ),
        "smollm3": TinyFamily(
            "SmolLM3Config",
            "one layer without RoPE",
            {"no_rope_layers": [1, 0, 1, 1], "num_hidden_layers": 4},
        ),
        "gpt_oss": TinyFamily(
            "GptOssConfig",
            "attention sinks, sliding and full layers, experts",
            {**_windowed(8, 1, 3), **_MOE, "intermediate_size": 64},
            rope="yarn",
        ),
        "granite": TinyFamily(
            "GraniteConfig",
            "multipliers on embeddings, residuals, attention and logits",
            {
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.7,
                "attention_multiplier": 0.3,
                "logits_scaling": 1.25,
            },
            embedding_std=0.17,
        ),
        "olmo2": TinyFamily("Olmo2Config", "QK norm over all heads at once; norms after blocks"),
        "stablelm": TinyFamily("StableLmConfig", "quarter rotary", partial=0.25, ropes=_SLICED),
        "phi": TinyFamily("PhiConfig", "half rotary, parallel block", partial=0.5, ropes=_SLICED),
        "glm4": TinyFamily("Glm4Config", "interleaved half rotary", partial=0.5, ropes=_SLICED),
        "starcoder2": TinyFamily("Starcoder2Config", "all layers slide", {"sliding_window": 16}),
        "qwen3_moe": TinyFamily("Qwen3MoeConfig", "experts", {**_MOE, "moe_intermediate_size": 64}),
        "exaone4": TinyFamily(
            "Exaone4Config", "sliding layers rotate, the full one does not", _windowed(8, 2)
        ),
        "llama4_text": TinyFamily(
            "Llama4TextConfig",
            "chunked attention, complex RoPE, layers without RoPE, query temperature",
            {
                **_MOE,
                "num_hidden_layers": 4,
                "intermediate_size_mlp": 128,
                "moe_layers": [1],
                "no_rope_layers": [1, 0, 1, 1],
                "layer_types": [CHUNKED, FULL, CHUNKED, CHUNKED],
                "attention_chunk_size": 16,
                "floor_scale": 8,
            },
        ),
    }
)
"""Families that :func:`tiny_model` makes."""

_SHARED_KV = {
    **_windowed(8, 1, 3),
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 8,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
}
_DELTA_NET = {
    "num_hidden_layers": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_SSM = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}

REFUSED: Mapping[str, TinyFamily] = MappingProxyType(
    {
        "bloom": TinyFamily("BloomConfig", "ALiBi", {"n_layer": 2, "n_head": 4}),
        "mpt": TinyFamily("MptConfig", "ALiBi", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
        "mamba": TinyFamily("MambaConfig", "state space"),
        "deepseek_v3": TinyFamily("DeepseekV3Config", "MLA latents", {**_MOE, **_MLA}),
        "falcon_h1": TinyFamily("FalconH1Config", "attention beside a state space", _SSM),
        "lfm2": TinyFamily(
            "Lfm2Config", "convolution layers", {"layer_types": ["conv", FULL, "conv"]}
        ),
        "qwen3_next": TinyFamily("Qwen3NextConfig", "linear attention", {**_MOE, **_DELTA_NET}),
        "gemma3n_text": TinyFamily(
            "Gemma3nTextConfig",
            "KV shared across layers",
            {**_SHARED_KV, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
            local_theta=1_000.0,
        ),
        "gemma4_text": TinyFamily(
            "Gemma4TextConfig", "KV shared across layers", _SHARED_KV, local_theta=1_000.0
        ),
        "gptj": TinyFamily(
            "GPTJConfig",
            "attention outside the interface, and RoPE by a table",
            {**_GPT_SIZES, "rotary_dim": 8},
        ),
        "t5": TinyFamily(
            "T5Config",
            "encoder and decoder",
            {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
            auto="AutoModelForSeq2SeqLM",
        ),
    }
)
"""Architectures that kvedit refuses; `note` says why."""
