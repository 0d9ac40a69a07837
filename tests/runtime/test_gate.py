"""The compatibility gate, refusals by name, and bad input: one clear error each."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kvedit as kv
from kvedit.editors import Emphasize
from kvedit.errors import (
    IncompatibleModel,
    InvalidArgument,
    MutatedMemory,
    UnknownName,
    UnsupportedModel,
)
from kvedit.models.fingerprint import fingerprint
from kvedit.models.tiny import REFUSED, refused_model, tiny_model

TEXT = "The refund window is 60 days."


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_unsupported_architectures_are_refused_by_name(name):
    model, tokenizer = refused_model(name)
    with pytest.raises(UnsupportedModel) as caught:
        kv.capture(model, tokenizer, TEXT)
    message = str(caught.value)
    assert type(model).__name__ in message
    # GPT-J came to the interface with transformers 5.24; its RoPE is a table, no frequencies.
    words = {
        "bloom": "interface",
        "gptj": ("interface", "no rotation"),
        "mpt": "ALiBi",
        "deepseek_v3": "MLA",
        "mamba": "linear attention",
        "falcon_h1": "linear attention",
        "lfm2": "linear attention",
        "qwen3_next": "linear attention",
        "gemma3n_text": "share",
        "gemma4_text": "share",
        "t5": "encoder",
    }
    expected = words[name]
    assert any(word in message for word in ([expected] if isinstance(expected, str) else expected))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_compiled_and_training_models_are_refused(tiny):
    model, tokenizer = tiny("llama")
    with pytest.raises(UnsupportedModel, match="compiled"):
        kv.capture(torch.compile(model), tokenizer, TEXT)
    trained, _ = tiny_model("llama")
    with pytest.raises(InvalidArgument, match=r"model\.eval"):
        kv.capture(trained.train(), tokenizer, TEXT)


def test_another_weight_family_or_tokenizer_is_refused_with_both_values(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    other, _ = tiny_model("llama", seed=1)
    with pytest.raises(IncompatibleModel, match="weights fingerprint: memory live:"):
        kv.generate(other, tokenizer, memory, " a")
    kv.generate(other, tokenizer, memory, " a", max_new_tokens=2, strict=False)
    family, other_tokenizer = tiny("qwen3")
    with pytest.raises(IncompatibleModel, match="layer 0 key_dim: memory 16, model 32"):
        kv.generate(family, other_tokenizer, memory, " a", strict=False)
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    with pytest.raises(IncompatibleModel, match="tokenizer fingerprint"):
        kv.generate(model, changed, memory, " a")


def test_a_changed_rope_setting_is_refused(tiny):
    model, tokenizer = tiny_model("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(IncompatibleModel, match="rope"):
        kv.generate(model, tokenizer, memory, " a")


def test_one_changed_weight_anywhere_is_seen():
    model, tokenizer = tiny_model("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    for parameter in (model.lm_head.weight, model.model.layers[1].mlp.up_proj.weight):
        with torch.no_grad():
            before = parameter[-1, -1].clone()
            parameter[-1, -1] += 1e-3
        with pytest.raises(IncompatibleModel, match="weights"):
            kv.generate(model, tokenizer, memory, " a")
        with torch.no_grad():
            parameter[-1, -1] = before
    kv.generate(model, tokenizer, memory, " a", max_new_tokens=1)


def test_unknown_rules_and_mutated_memories_are_refused(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    ruled = dataclasses.replace(memory, rules=({"rule": "mass_target", "version": 1},))
    with pytest.raises(UnsupportedModel, match="mass_target"), kv.attach(model, ruled):
        pass
    memory.layers[0].values[0, 0, 0] = 7
    with pytest.raises(MutatedMemory, match="values"), kv.attach(model, memory):
        pass


def test_learned_adapters_are_part_of_the_identity():
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    model, tokenizer = tiny_model("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    # PEFT's own call: transformers 5.24's add_adapter asks for a PEFT that is not out yet.
    peft.inject_adapter_in_model(config, model)
    with pytest.raises(IncompatibleModel, match="adapters"):
        kv.generate(model, tokenizer, memory, " a")


def test_virtual_tokens_are_adapters_though_no_layer_holds_them():
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    model, tokenizer = tiny_model("llama")
    plain = fingerprint(model, tokenizer)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert plain.adapters == ""
    assert fingerprint(peft.get_peft_model(model, config), tokenizer).adapters


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, t: kv.capture(m, t, ""), InvalidArgument, "empty"),
        (lambda m, t: kv.capture(m, t, []), InvalidArgument, "empty"),
        (lambda m, t: kv.capture(m, t, [[]]), InvalidArgument, "empty"),
        (lambda m, t: kv.capture(m, None, "text"), InvalidArgument, "tokenizer"),
        (lambda m, t: kv.capture(m, t, 7), InvalidArgument, "expected a text"),
        (lambda m, t: kv.capture(m, t, [{"role": "user"}]), InvalidArgument, "content"),
        (lambda m, t: kv.capture(m, t, TEXT, layers=[9]), UnknownName, "layer"),
        (lambda m, t: kv.capture(m, t, TEXT, chunk=0), InvalidArgument, "chunk"),
        (lambda m, t: kv.capture(m, t, TEXT, window="half"), InvalidArgument, "window"),
        (lambda m, t: kv.generate(m, t, kv.capture(m, t, TEXT), ""), InvalidArgument, "empty"),
        (
            lambda m, t: kv.generate(m, t, kv.capture(m, t, TEXT), " a", max_new_tokens=0),
            InvalidArgument,
            "max_new_tokens",
        ),
        (
            lambda m, t: kv.generate(m, t, kv.capture(m, t, [TEXT, TEXT]), [" a"] * 3),
            InvalidArgument,
            "3 prompts for 2 rows",
        ),
        (lambda m, t: kv.score(m, t, kv.capture(m, t, TEXT), " a", "b"), InvalidArgument, "list"),
        (lambda m, t: kv.score(m, t, kv.capture(m, t, TEXT), " a", []), InvalidArgument, "list"),
        (
            lambda m, t: Emphasize(span="nothing of it", strength=1.0)(kv.capture(m, t, TEXT)),
            kv.errors.SpanNotFound,
            "nothing matches",
        ),
        (lambda m, t: Emphasize(span="60", strength=float("nan")), InvalidArgument, "strength"),
        (lambda m, t: kv.editors.build("emphasise", span="60"), UnknownName, "emphasize"),
        (lambda m, t: kv.load("no/such-model-here"), InvalidArgument, "can't load"),
    ],
)
def test_bad_input_is_one_clear_error(tiny, call, error, message):
    model, tokenizer = tiny("llama")
    with pytest.raises(error, match=message):
        call(model, tokenizer)
