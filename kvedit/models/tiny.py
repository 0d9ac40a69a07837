"""Tiny random models of many families: seeded, offline, and not degenerate. For tests and demos."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvedit.errors import UnknownName
from kvedit.models.tiny_families import (
    FAMILIES,
    FULL,
    REFUSED,
    ROPE_TYPES,
    SLIDING,
    TinyFamily,
)
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

_COMMON: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,  # a tied random model repeats its input
}
_GAIN = 1.3  # of every matrix: attention logits then spread over about 1.5
_HEAD_GAIN = 2.5  # of the output matrix: next-token distributions are then neither flat nor certain


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
    return {FULL: main, SLIDING: {"rope_type": "default", "rope_theta": spec.local_theta}}


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
