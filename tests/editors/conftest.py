"""What editors are tried on: one tiny model per family, captured once and never changed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.memory import KVMemory
from kvedit.memory.digest import canonical_json, digest_bytes, digest_tensor
from kvedit.testing import CONTEXT, CONTINUATION, apply_editor, tiny_model

# Their experts run a grouped matrix product that has no float64.
ONLY_FP32 = ("gpt_oss", "llama4_text", "qwen3_moe")

PIECE = 6  # tokens of the continuation that are fed at once; the rest goes one by one


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, the memory it has of the matrix's context, and how it continues."""

    model: Any
    tokenizer: Any
    memory: KVMemory
    continuation: torch.Tensor
    logits: torch.Tensor

    def apply(self, editor: Any, memory: KVMemory | None = None) -> KVMemory:
        """The edited memory; the editor gets the operands and the reader that it asks for."""
        return apply_editor(editor, memory or self.memory, self.model, self.tokenizer)

    def weights(self) -> str:
        """Digest of all parameters, read anew."""
        found = {name: digest_tensor(p) for name, p in self.model.named_parameters()}
        return digest_bytes(canonical_json(found))


@functools.cache
def _subject(family: str, dtype: torch.dtype | None = None, window: str = "whole") -> Subject:
    """The subject of a family, in float64 unless the family has none."""
    wide = torch.float32 if family in ONLY_FP32 else torch.float64
    model, tokenizer = tiny_model(family, dtype=dtype or wide)
    memory = kv.capture(model, tokenizer, CONTEXT, window=window)
    ids = tokenizer(CONTINUATION, add_special_tokens=False, return_tensors="pt").input_ids[0]
    assert len(ids) > PIECE + 2
    return Subject(model, tokenizer, memory, ids, _continued(model, memory, ids))


def _continued(model: Any, memory: KVMemory, ids: torch.Tensor) -> torch.Tensor:
    """Logits [query, vocabulary] of ids fed to an attached memory in pieces of two sizes."""
    with kv.attach(model, memory) as session:
        pieces = [session.forward(ids[None, :PIECE])[0]]
        for index in range(PIECE, len(ids)):
            pieces.append(session.forward(ids[None, index : index + 1])[0])
    return torch.cat(pieces)


def _full_pass(
    model: Any, tokens: torch.Tensor, following: torch.Tensor, before: Any, after: Any
) -> torch.Tensor:
    """Logits [query, vocabulary] of tokens that follow a context, from one eager pass over both.

    ``before`` and ``after`` hold per layer a bias [query_head, token] on the context's tokens, for
    queries of the context itself and for those that follow. No cache, no memory, no bias path.
    """
    ids, context = torch.cat((tokens, following))[None], len(tokens)

    def add(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            mask = kwargs["attention_mask"]
            heads = model.config.num_attention_heads
            mask = mask.expand(1, heads, *mask.shape[2:]).clone()
            for rows, bias in ((slice(0, context), before), (slice(context, None), after)):
                if layer in bias:
                    mask[0, :, rows, :context] += bias[layer][:, None, :].to(mask)
            return args, {**kwargs, "attention_mask": mask.clamp_min(torch.finfo(mask.dtype).min)}

        return hook

    named = {module.layer_idx: module for module in model.modules() if hasattr(module, "layer_idx")
             and "ttention" in type(module).__name__}  # fmt: skip
    handles = [m.register_forward_pre_hook(add(i), with_kwargs=True) for i, m in named.items()]
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits[0, context:]
    finally:
        model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="session")
def full_pass() -> Any:
    """``full_pass(model, tokens, following, before, after)``: see :func:`_full_pass`."""
    return _full_pass


@pytest.fixture(scope="session")
def subject() -> Any:
    """``subject(family, dtype=None, window="whole")``; the same object for the same arguments."""
    return _subject


@pytest.fixture(scope="session")
def continued() -> Any:
    """``continued(model, memory, ids)``: logits of ids after an attached memory."""
    return _continued
