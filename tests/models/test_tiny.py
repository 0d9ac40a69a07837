"""Tiny models and their tokenizer: offline, deterministic, and not degenerate."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kvedit.errors import UnknownName
from kvedit.models.tiny import (
    FAMILIES,
    REFUSED,
    ROPE_TYPES,
    family_names,
    refused_model,
    tiny_model,
)
from kvedit.models.tiny_tokenizer import SPECIAL_TOKENS, printable_ids, tiny_tokenizer

TEXTS = [
    "The thing in the box is the answer, and you would not wait for it.",
    "  two  leading spaces,\ttabs\n\n\nnewlines \n and a trailing one ",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d, \u0645\u0631\u062d\u0628\u0627 \U0001f642",
    "combining e\u0301, zero\u200dwidth, \x00 \x7f \ufffd",
    "",
]
MESSAGES = [
    {"role": "system", "content": "Answer with one word."},
    {"role": "user", "content": " What is the number? "},
    {"role": "assistant", "content": "\n\nforty two\n"},
    {"role": "user", "content": "the"},
]
# The contexts differ only more than a window (8) before their end, and end in the same tokens.
NEAR = "The secret number is forty two. What is it?"
FAR = "The river is in the old town. What is it?"


def _logits(family: str, text: str = NEAR, **options: object) -> Tensor:
    """Returns the logits [token, vocabulary] of a fresh tiny model."""
    model, tokenizer = tiny_model(family, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        logits: Tensor = model(**tokenizer(text, return_tensors="pt")).logits
    return logits[0]


@pytest.mark.parametrize("family", family_names())
def test_same_seed_gives_the_same_bits_and_another_seed_does_not(family: str) -> None:
    first = _logits(family)
    torch.randn(7)  # the global generator must not matter
    assert torch.isfinite(first).all()
    assert torch.equal(first, _logits(family))
    assert (first - _logits(family, seed=1)).abs().mean() > 0.3


@pytest.mark.parametrize("family", family_names())
def test_predictions_are_neither_flat_nor_certain_nor_constant(family: str) -> None:
    logits = _logits(family)
    probabilities = logits.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    assert 1.0 < entropy < 5.5  # nats; uniform is 5.9
    assert len(logits.argmax(-1).unique()) > len(logits) // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", family_names())
def test_greedy_continuation_depends_on_the_context(family: str, dtype: torch.dtype) -> None:
    model, tokenizer = tiny_model(family, dtype=dtype)
    continuations = []
    for text in (NEAR, FAR):
        ids = tokenizer(text, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        continuations.append(out[0, ids.shape[1] :])
    near, far = continuations
    assert len(near) == len(far) == 12  # no stop token in between
    assert not torch.equal(near, far)
    assert len(near.unique()) >= 4 or len(far.unique()) >= 4
    assert tokenizer.decode(near).isprintable()


@pytest.mark.parametrize("family", family_names())
def test_model_is_ready_to_use(family: str) -> None:
    state = torch.get_rng_state()
    model, tokenizer = tiny_model(family, dtype=torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer)
    for holder in (model.config, model.generation_config):
        assert holder.bos_token_id == tokenizer.bos_token_id
        assert holder.eos_token_id == tokenizer.eos_token_id
        assert holder.pad_token_id == tokenizer.pad_token_id
    frequencies = [b for name, b in model.named_buffers() if name.endswith("inv_freq")]
    assert bool(frequencies) == bool(FAMILIES[family].ropes)
    assert all(b.dtype == torch.float32 for b in frequencies)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        (family, rope)
        for family, spec in FAMILIES.items()
        for rope in spec.ropes
        if rope != spec.rope
    ],
)
def test_every_rope_type_changes_the_model(family: str, rope: str) -> None:
    long = " ".join([NEAR] * 5)  # beyond the 64 positions where dynamic and longrope switch
    other = _logits(family, long, rope=rope)
    assert torch.isfinite(other).all()
    assert (other - _logits(family, long)).abs().max() > 0.05


def test_rope_types_are_all_that_transformers_has() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert {"default", *ROPE_INIT_FUNCTIONS} == set(ROPE_TYPES)
    assert FAMILIES["llama"].ropes == ROPE_TYPES


def test_sliding_layers_forget_and_full_ones_do_not() -> None:
    """Three layers of window 8 reach 21 tokens back; a full layer reaches everything."""
    tail = " and then they came home for the weekend with all of the people in the town"
    for family, forgets in (("mistral", True), ("gemma3", False), ("llama", False)):
        near = _logits(family, "forty" + tail)[-1]
        far = _logits(family, "eight" + tail)[-1]
        assert torch.allclose(near, far, atol=1e-4) == forgets


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_architectures_run(name: str) -> None:
    model, tokenizer = refused_model(name)
    inputs = tokenizer(NEAR, return_tensors="pt")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs.input_ids
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_unknown_names_are_refused_with_near_ones() -> None:
    with pytest.raises(UnknownName, match="gemma2"):
        tiny_model("gema2")
    with pytest.raises(UnknownName, match="yarn"):
        tiny_model("llama", rope="yarm")
    with pytest.raises(UnknownName, match="gpt2"):
        tiny_model("gpt2", rope="default")
    with pytest.raises(UnknownName, match="mamba"):
        refused_model("mamba2")


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip_and_offsets_tile_it(text: str) -> None:
    tokenizer = tiny_tokenizer()
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    assert tokenizer.decode(encoded.input_ids) == text
    end = 0
    for token, (start, stop) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        # The bytes of one character share its offsets; otherwise a token begins where one ended.
        assert start == end or (stop == end and stop - start == 1)
        piece = tokenizer.decode([token])
        assert piece == text[start:stop] or stop - start == 1
        end = stop
    assert end == len(text)


def test_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) <= 512
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.padding_side == "left"
    batch = tokenizer(["the", "the thing"], padding=True)
    assert batch.input_ids[0][0] == tokenizer.pad_token_id
    assert batch.attention_mask[0][0] == 0
    assert tokenizer.decode(tokenizer("the").input_ids, skip_special_tokens=True) == "the"
    assert not set(printable_ids(tokenizer)) & set(tokenizer.all_special_ids)


def test_common_english_pieces_are_single_tokens() -> None:
    tokenizer = tiny_tokenizer()
    for piece in (" the", "ing", " and", "The", " of"):
        assert len(tokenizer(piece, add_special_tokens=False).input_ids) == 1


def test_vocabulary_is_the_same_in_another_process() -> None:
    code = (
        "from kvedit.models.tiny_tokenizer import tiny_tokenizer;"
        "print(tiny_tokenizer().backend_tokenizer.to_str(), end='')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == tiny_tokenizer().backend_tokenizer.to_str()


def test_rendering_of_fewer_messages_is_a_prefix() -> None:
    tokenizer = tiny_tokenizer()

    def render(count: int, prompt: bool = False) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(
            MESSAGES[:count], add_generation_prompt=prompt, return_dict=False
        )
        return ids

    whole = render(len(MESSAGES))
    assert tokenizer.bos_token_id not in whole
    for count in range(1, len(MESSAGES)):
        shorter, longer = render(count), render(count + 1)
        assert longer[: len(shorter)] == shorter
        if MESSAGES[count]["role"] == "assistant":
            prompt = render(count, prompt=True)
            assert longer[: len(prompt)] == prompt
    text = tokenizer.apply_chat_template(MESSAGES[1:2], tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>user\n What is the number? <|im_end|>\n<|im_start|>assistant\n")
