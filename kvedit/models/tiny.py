"""Tiny random models of many families: seeded, offline, and not degenerate. For tests and demos."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvedit.errors import UnknownName
from kvedit.models.tiny_tokenizer import printable_ids, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "FAMILIES",
    "REFUSED",
    "ROPE_TYPES",
    "TinyFamily",
    "family_names",
    "refused_model",
    "tiny_model",
]

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

_COMMON: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,  # a tied random model repeats its input
}
_SLIDING, _FULL, _CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
_GAIN = 1.3  # of every matrix: attention logits then spread over about 1.5
_HEAD_GAIN = 2.5  # of the output matrix: next-token distributions are then neither flat nor certain


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
    kinds = [_FULL if layer in full else _SLIDING for layer in range(layers)]
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
                "layer_types": [_CHUNKED, _FULL, _CHUNKED, _CHUNKED],
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
            "Lfm2Config", "convolution layers", {"layer_types": ["conv", _FULL, "conv"]}
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
            "GPTJConfig", "attention outside the interface", {**_GPT_SIZES, "rotary_dim": 8}
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


def family_names() -> tuple[str, ...]:
    """Returns the names that :func:`tiny_model` takes."""
    return tuple(FAMILIES)


def tiny_model(
    family: str,
    *,
    rope: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attn: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Returns a small random causal model in eval mode on the CPU, and its tokenizer.

    Weights depend on family, seed and parameter name only; in half precision they are the rounded
    float32 ones. Attention is peaked, next tokens depend on far context, and a greedy continuation
    is printable text. The global random state stays as it was.

    Args:
        family: a key of :data:`FAMILIES`.
        rope: one of :data:`ROPE_TYPES`; None keeps the family's own. `dynamic` and `longrope`
            change their frequencies beyond 64 positions; `yarn` and `llama3` scale from 512.
        dtype: of the weights.
        seed: of the weights.
        attn: attention implementation; None leaves the choice to transformers.

    Raises:
        UnknownName: for a family that isn't listed, or a RoPE type that the family doesn't take.

    Example:
        >>> model, tokenizer = tiny_model("llama")
        >>> model(**tokenizer("The thing", return_tensors="pt")).logits.shape
        torch.Size([1, 4, 357])
    """
    spec = _lookup("tiny model family", family, FAMILIES)
    if rope is not None and rope not in spec.ropes:
        raise UnknownName(f"RoPE type of tiny {family}", rope, spec.ropes)
    tokenizer = tiny_tokenizer()
    model = _build(spec, tokenizer, rope or spec.rope, dtype, seed, attn)
    _fill(model, seed, spec.embedding_std)
    _prefer_printable(model, printable_ids(tokenizer))
    return model, tokenizer


def refused_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Returns a tiny model of an architecture that kvedit must refuse, and its tokenizer.

    Args:
        name: a key of :data:`REFUSED`.

    Raises:
        UnknownName: for a name that isn't listed.
    """
    spec = _lookup("refused tiny model", name, REFUSED)
    tokenizer = tiny_tokenizer()
    return _build(spec, tokenizer, spec.rope, torch.float32, 0, None), tokenizer


def _lookup(kind: str, name: str, table: Mapping[str, TinyFamily]) -> TinyFamily:
    """Returns the entry of a table, or raises with near names."""
    if name not in table:
        raise UnknownName(kind, name, table)
    return table[name]


def _build(
    spec: TinyFamily,
    tokenizer: PreTrainedTokenizerFast,
    rope: str,
    dtype: torch.dtype,
    seed: int,
    attn: str | None,
) -> PreTrainedModel:
    """Returns the model with the weights that transformers gives it, in eval mode."""
    import transformers

    config = _config(spec, tokenizer, rope)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the accelerators as well, which aren't forked.
        torch.default_generator.manual_seed(seed)
        # The dtype goes in here, not through `.to()`, which would round the RoPE frequencies too.
        model: PreTrainedModel = getattr(transformers, spec.auto).from_config(
            config, dtype=dtype, attn_implementation=attn
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model.eval()


def _config(spec: TinyFamily, tokenizer: PreTrainedTokenizerFast, rope: str) -> PreTrainedConfig:
    """Returns the configuration: shared sizes, the family's own options, RoPE and token ids."""
    import transformers

    cls = getattr(transformers, spec.config)
    known = {option.name for option in dataclasses.fields(cls)}
    options: dict[str, Any] = {**_COMMON, "head_dim": spec.head_dim}
    options = {name: value for name, value in options.items() if name in known}
    if "rope_parameters" in known and spec.ropes:
        options["rope_parameters"] = _rope_parameters(spec, rope)
        if rope == "dynamic":  # its frequencies change beyond the longest position
            options["max_position_embeddings"] = 64
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    return cls(
        **{**options, **spec.options},
        **ids,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
    )


def _rope_parameters(spec: TinyFamily, rope: str) -> dict[str, Any]:
    """Returns `rope_parameters`; a mapping from layer kind where the family has two bases."""
    pairs = int(spec.head_dim * spec.partial) // 2
    extra: dict[str, dict[str, Any]] = {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 8.0, "original_max_position_embeddings": 512},
        "longrope": {
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0 + 0.05 * pair for pair in range(pairs)],
            "long_factor": [1.0 + 0.5 * pair for pair in range(pairs)],
        },
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        "proportional": {"factor": 1.0, "partial_rotary_factor": 0.5},
    }
    main = {"rope_type": rope, "rope_theta": 10_000.0, **extra.get(rope, {})}
    if spec.partial != 1.0:
        main["partial_rotary_factor"] = spec.partial
    if spec.local_theta is None:
        return main
    return {_FULL: main, _SLIDING: {"rope_type": "default", "rope_theta": spec.local_theta}}


@torch.no_grad()
def _fill(model: PreTrainedModel, seed: int, embedding_std: float) -> None:
    """Overwrites matrices with noise scaled to their width and jitters norms, biases and sinks."""
    tokens = model.get_input_embeddings().weight
    output = model.get_output_embeddings().weight
    tables = {id(m.weight): 0.5 for m in model.modules() if isinstance(m, nn.Embedding)}
    tables[id(tokens)] = embedding_std
    flipped = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}  # GPT-2
    for name, weight in model.named_parameters():
        # A generator per name: a parameter that a new transformers adds leaves the others alone.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() < 2:
            weight.add_((0.1 * noise).to(weight.dtype))
            continue
        width = weight.shape[0 if id(weight) in flipped else -1]
        gain = (_HEAD_GAIN if weight is output else _GAIN) / math.sqrt(width)
        weight.copy_(noise * tables.get(id(weight), gain))


@torch.no_grad()
def _prefer_printable(model: PreTrainedModel, printable: list[int]) -> None:
    """Shrinks the output rows of special tokens and lone bytes, so that greedy text is readable."""
    output: Tensor = model.get_output_embeddings().weight
    quiet = torch.ones(len(output), dtype=torch.bool)
    quiet[printable] = False
    output[quiet] *= 0.25
