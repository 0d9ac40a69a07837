"""A packed pass against one session per sample: the runtime is the oracle, it packs nothing."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.cartridges import Prefix, collate, open_packed, train
from kvedit.cartridges.prefix import join
from kvedit.editors import Concat, Drop, Emphasize, Suppress
from kvedit.errors import ContextTooLong, InvalidArgument, UnsupportedModel
from kvedit.models.tiny import tiny_model
from kvedit.testing.tolerances import FP32_LOGITS, FP64_ORACLE

FAMILIES = [
    ("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa"), ("gemma3", "sdpa"),
    ("gemma3", "eager"), ("gpt_neox", "sdpa"), ("gpt2", "sdpa"), ("gpt_oss", "eager"),
    ("cohere2", "sdpa"),
]  # fmt: skip


def apart(model, memory, samples):
    """Logits at supervised tokens, each sample in a session of its own."""
    found = []
    for sample in samples:
        with kv.attach(model, memory) as session:
            logits = session.forward(sample.tokens[None, :-1])
        found.append(logits[0, sample.start - 1 :])
    return torch.cat(found)


def packed(model, memory, rows, **options):
    with torch.no_grad(), open_packed(model, **options) as base:
        return base.logits(Prefix.of(memory), collate(rows))


@pytest.mark.parametrize(("family", "attn"), FAMILIES)
def test_a_packed_pass_equals_sessions_one_by_one(family, attn, subject, samples):
    # experts of gpt_oss have no float64
    exact = family != "gpt_oss"
    found = subject(family, attn, torch.float64 if exact else torch.float32)
    rows = [samples[:3], samples[3:5], samples[5:]]
    logits = packed(found.model, found.memory, rows)
    expected = apart(found.model, found.memory, samples)
    assert (logits - expected).abs().max() <= (FP64_ORACLE if exact else FP32_LOGITS)


@pytest.mark.parametrize(("family", "attn"), [("llama", "sdpa"), ("gemma3", "eager")])
def test_it_does_after_edits_that_bias_evict_and_leave_gaps(family, attn, subject, samples):
    found = subject(family, attn, torch.float64)
    memory = Emphasize(span="60 days", strength=2.0, heads=(1,))(found.memory)
    memory = Drop(span="in the box", layers=(0, 2))(memory)
    memory = Suppress(span="The refund", strength=float("inf"), kv_heads=(0,))(memory)
    logits = packed(found.model, memory, [samples[:5], samples[5:]])
    assert (logits - apart(found.model, memory, samples)).abs().max() <= FP64_ORACLE
    plain = packed(found.model, found.memory, [samples[:5], samples[5:]])
    assert (logits - plain).abs().max() > 1e-2


def test_windows_hide_by_position_and_not_by_place_in_the_row(subject, sample_of):
    found = subject("gemma3", dtype=torch.float64)
    windows = [spec.window for spec in found.memory.model.layers if spec.window]
    long = [sample_of(n, max(windows) + 20, 10) for n in range(2)]
    logits = packed(found.model, found.memory, [long])
    assert (logits - apart(found.model, found.memory, long)).abs().max() <= FP64_ORACLE


def test_samples_of_a_row_do_not_see_each_other(subject, samples):
    found = subject(dtype=torch.float64)
    alone = packed(found.model, found.memory, [[samples[1]]])
    beside = packed(found.model, found.memory, [[samples[0], samples[1]]])
    assert (beside[-len(alone) :] - alone).abs().max() <= FP64_ORACLE


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_a_joined_prefix_equals_the_concatenated_memory(family, rotate, subject, samples):
    found = subject(family, dtype=torch.float64)
    other = kv.capture(found.model, found.tokenizer, "Keep the receipt. ")
    other = Emphasize(span="receipt", strength=1.0)(other)
    whole = Concat(rotate=rotate)(other, found.memory)
    batch = collate([samples[:4]])
    with torch.no_grad(), open_packed(found.model) as base:
        parts = [Prefix.of(other), Prefix.of(found.memory)]
        logits = base.logits(join(parts, base.spec, rotate), batch)
    expected = apart(found.model, whole, samples[:4])
    assert (logits - expected).abs().max() <= FP64_ORACLE


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_recomputed_blocks_give_the_same_gradient(family, subject, samples):
    found = subject(family)
    gradients = []
    for recompute in (False, True):
        prefix = Prefix.of(found.memory)
        leaves = [s.values.clone().requires_grad_() for s in prefix.layers]
        layers = tuple(
            type(s)(s.keys, leaf, s.positions)
            for s, leaf in zip(prefix.layers, leaves, strict=True)
        )
        with open_packed(found.model, recompute=recompute) as base:
            logits = base.logits(Prefix(layers, prefix.next_position), collate([samples[:3]]))
            logits.square().mean().backward()
        gradients.append([leaf.grad for leaf in leaves])
        assert all("forward" not in vars(module) for module in found.model.modules())
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)
        assert one.abs().sum() > 0


def test_the_output_matrix_sees_supervised_tokens_only(subject, samples):
    found = subject()
    seen = []
    head = found.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    try:
        packed(found.model, found.memory, [samples[:2], samples[2:4]])
    finally:
        handle.remove()
    supervised = sum(len(sample) - sample.start for sample in samples[:4])
    assert [shape[:2].numel() for shape in seen] == [supervised]


def test_the_model_is_as_before_after_an_error(subject):
    found = subject()
    wanted = [weight.requires_grad for weight in found.model.parameters()]
    attention = found.model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), open_packed(found.model, recompute=True):
        assert not any(weight.requires_grad for weight in found.model.parameters())
        raise ZeroDivisionError
    assert [weight.requires_grad for weight in found.model.parameters()] == wanted
    assert found.model.config._attn_implementation == attention


def test_what_can_not_be_packed_is_refused(subject):
    found = subject()
    with open_packed(found.model) as base, pytest.raises(ContextTooLong, match="16384"):
        base.check_length(16380, 10)
    rules = kv.editors.SpotLight(spans=["60 days"], target=0.4)(found.memory)
    with pytest.raises(InvalidArgument, match="run-time rules"):
        Prefix.of(rules)
    some = kv.capture(found.model, found.tokenizer, "Some layers.", layers=[0])
    with pytest.raises(InvalidArgument, match="all of them"):
        Prefix.of(some)
    wrapped = torch.nn.Module()
    wrapped.inner = type("FSDPLinear", (torch.nn.Linear,), {})(2, 2)
    with pytest.raises(UnsupportedModel, match="sharded"), open_packed(wrapped):
        pass


@pytest.mark.slow  # transformers compiles masks of its own while the model is looked at
@pytest.mark.parametrize("family", ["gemma3"])
def test_flex_attention_sees_the_same_by_its_block_mask(family, subject, samples, monkeypatch):
    # Not compiled, which takes minutes on the CPU, and forward only: it has no backward there.
    from torch.nn.attention import flex_attention as flex
    from transformers.integrations import flex_attention as integration

    plain = flex.flex_attention
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    monkeypatch.setattr(integration, "WrappedFlexAttention", lambda training: lambda: plain)
    memory = subject(family, "sdpa").memory
    rows = [samples[:4], samples[4:]]
    one, other = (
        packed(subject(family, attn).model, memory, rows) for attn in ("sdpa", "flex_attention")
    )
    assert (one - other).abs().max() <= FP32_LOGITS


def test_training_on_flex_without_a_backward_is_refused(subject, samples):
    model, _ = tiny_model("llama", attn="flex_attention")
    with pytest.raises(UnsupportedModel, match="no backward on the CPU"):
        train(model, subject().memory, samples)
