"""PEFT adapters: real PEFT reads what we write and writes what we read; logits are the oracle."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvedit as kv
from kvedit.editors import Chain, Shift, Suppress
from kvedit.errors import (
    CorruptMemory,
    IncompatibleModel,
    InvalidArgument,
    NotFound,
    ShapeMismatch,
)
from kvedit.interop import check, from_peft, to_peft
from kvedit.interop.live import imported_facts
from kvedit.models.cache_argument import cache_argument
from kvedit.models.tiny import tiny_model

peft = pytest.importorskip("peft")

FAMILIES = ("llama", "qwen3", "gemma3")
KINDS = ("CARTRIDGE", "PREFIX_TUNING")


@pytest.fixture(autouse=True)
def quiet():
    # PEFT passes the cache under the name that transformers gave it before 5.24.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        yield


def loaded(case, folder):
    """A fresh base model under the adapter: the case's own stays as it is."""
    base, _ = tiny_model(case.family)
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def forward(adapted, ids, **options):
    options.setdefault("attention_mask", torch.ones_like(ids))
    with torch.no_grad():
        return adapted(input_ids=ids, **options).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["whole", "compact"])
def test_peft_gives_the_logits_of_attach(case_of, far, tmp_path, family, kind, which):
    case = case_of(family)
    memory = case.memory(which)
    done = to_peft(memory, tmp_path / "adapter", kind=kind)
    assert done.moved == memory.slots - memory.next_position
    assert (done.moved == 0) == (which == "whole")
    adapted = loaded(case, tmp_path / "adapter")
    assert type(adapted.active_peft_config).__name__.upper().startswith(kind.split("_")[0])
    wanted = case.logits(memory)
    assert far(forward(adapted, case.ids), wanted) <= 1e-5
    if which == "whole":  # the losslessness control
        assert far(forward(adapted, case.ids), case.full_context_logits()) <= 1e-5
    else:  # without turning the keys it would be another memory
        flat = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
        layer = memory.layers[0]
        left = layer.keys.transpose(0, 1).reshape(memory.slots, -1)
        assert not torch.allclose(flat[:, : left.shape[1]], left, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_same(case_of, tmp_path, family):
    case = case_of(family)
    to_peft(case.compact, tmp_path / "adapter")
    adapted = loaded(case, tmp_path / "adapter")
    wanted = case.greedy(case.compact)
    ids = case.ids
    for _ in wanted:  # through PEFT's own forward pass
        ids = torch.cat((ids, forward(adapted, ids)[:, -1:].argmax(-1)), dim=1)
    assert ids[0, case.ids.shape[1] :].tolist() == wanted
    base, slots, count = adapted.get_base_model(), case.compact.slots, case.ids.shape[1]
    options = {"max_new_tokens": len(wanted), "do_sample": False}
    if cache_argument(base) == "past_key_values":
        found = adapted.generate(
            input_ids=case.ids, attention_mask=torch.ones_like(case.ids), **options
        )
    else:  # as the card in the folder says: PEFT's generate has not followed the new name
        found = base.generate(
            case.ids,
            cache=adapted.get_prompt(1),
            position_ids=torch.arange(slots, slots + count)[None],
            attention_mask=torch.ones(1, slots + count),
            **options,
        )
    assert found[0, count:].tolist() == wanted


def test_left_padding_needs_position_ids(llama, far, tmp_path):
    to_peft(llama.compact, tmp_path / "adapter")
    adapted = loaded(llama, tmp_path / "adapter")
    pad, count = 5, llama.ids.shape[1]
    ids = torch.cat((torch.zeros(1, pad, dtype=torch.int64), llama.ids), dim=1)
    mask = torch.cat((torch.zeros(1, pad, dtype=torch.int64), torch.ones_like(llama.ids)), dim=1)
    places = (mask.cumsum(dim=1) - 1).clamp_min(0)  # from 0: PEFT adds the virtual tokens itself
    wanted = llama.logits(llama.compact)
    right = forward(adapted, ids, attention_mask=mask, position_ids=places)[:, -count:]
    assert far(right, wanted) <= 1e-5
    assert far(forward(adapted, ids, attention_mask=mask)[:, -count:], wanted) > 1e-3


@pytest.mark.parametrize("family", ["gpt_neox", "smollm3", "mistral", "glm4", "cohere2"])
def test_round_trip_over_partial_absent_and_interleaved_rope(case_of, far, tmp_path, family):
    case = case_of(family)
    to_peft(case.compact, tmp_path / "adapter")
    back = from_peft(tmp_path / "adapter", case.model, case.tokenizer)
    assert back.next_position == back.slots == case.compact.slots
    assert far(case.logits(back), case.logits(case.compact)) <= 1e-5
    for index, spec in enumerate(case.whole.model.layers):
        same = torch.equal(back.layers[index].keys, case.compact.layers[index].keys)
        assert same == (spec.rope is None)  # nothing to turn


def test_imported_memory(llama, tmp_path):
    to_peft(llama.compact, tmp_path / "a", frozen=3)
    back = from_peft(tmp_path / "a", llama.model, llama.tokenizer, source=llama.whole.source)
    slots = llama.compact.slots
    assert back.layers[1].positions.tolist() == list(range(slots))
    assert set(back.layers[1].source.tolist()) == {-1}
    assert back.source is llama.whole.source
    assert back.model == llama.whole.model
    node = back.lineage.head
    assert (node.operation, node.name, len(back.lineage.nodes)) == ("import", "peft", 1)
    facts = imported_facts(back)
    assert facts["frozen"] == 3
    assert set(facts["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in node.parameters
    again = from_peft(tmp_path / "a", llama.model, llama.tokenizer, source=llama.whole.source)
    assert again.digest == back.digest
    assert again.lineage.head.id == node.id
    assert from_peft(tmp_path / "a", llama.model).source is None
    # moved back to where it stood, it is the memory again
    home = Shift(offset=llama.compact.next_position - slots)(back)
    for index, layer in home.layers.items():
        torch.testing.assert_close(layer.keys, llama.compact.layers[index].keys, atol=1e-5, rtol=0)
        assert torch.equal(layer.values, llama.compact.layers[index].values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_made_is_imported(case_of, far, tmp_path, family, kind):
    """Initialised by PEFT, from its own prefill and at random, trained a step, saved by PEFT."""
    case = case_of(family)
    base, tokenizer = tiny_model(family)
    slots = 6  # PEFT's prefill of gemma3 keeps no more than its window of 8 in sliding layers
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": slots}
    config = peft.CartridgeConfig if kind == "CARTRIDGE" else peft.PrefixTuningConfig
    adapted = peft.get_peft_model(base, config(**options))
    peft.initialize_kv_prefix_from_text(
        adapted,
        tokenizer,
        text="The refund window is 60 days, and no more.",
        use_chat_template=False,
    )
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    adapted(input_ids=case.ids, labels=case.ids).loss.backward()
    optimizer.step()
    adapted.eval().save_pretrained(str(tmp_path / "theirs"))
    memory = from_peft(tmp_path / "theirs", case.model, case.tokenizer)
    assert memory.slots == slots
    assert imported_facts(memory)["frozen"] == (1 if kind == "CARTRIDGE" else 0)
    assert far(case.logits(memory), forward(adapted, case.ids)) <= 1e-5
    # and out again, to a folder that PEFT reads
    to_peft(memory, tmp_path / "ours", kind=kind)
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")["prompt_embeddings"]
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(ours, theirs)


def test_a_projected_prefix_is_imported_as_what_it_projects_to(llama, far, tmp_path):
    base, _ = tiny_model("llama")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24
    )
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(str(tmp_path / "a"))
    memory = from_peft(tmp_path / "a", llama.model)
    assert far(llama.logits(memory), forward(adapted, llama.ids)) <= 1e-5


def test_training_goes_on_in_peft(llama, tmp_path):
    to_peft(llama.compact, tmp_path / "a", frozen=2)
    flat = load_file(tmp_path / "a" / "adapter_model.safetensors")["prompt_embeddings"]
    base, _ = tiny_model("llama")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "a"))
    config.inference_mode = False
    adapted = peft.get_peft_model(base, config)
    adapted.prompt_encoder["default"].load_prompt_embeddings(flat)
    assert adapted.prompt_encoder["default"].frozen_embedding.shape[0] == 2
    torch.testing.assert_close(
        forward(adapted, llama.ids), llama.logits(llama.compact), atol=1e-4, rtol=0
    )


def test_half_precision_files(llama, tmp_path):
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        to_peft(llama.compact, tmp_path / name, dtype=name)
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        assert weights["prompt_embeddings"].dtype == dtype
        back = from_peft(tmp_path / name, llama.model)
        assert back.dtype == torch.float32  # the model's, as PEFT casts to it
        assert from_peft(tmp_path / name, llama.model, dtype=dtype).dtype == dtype
        assert from_peft(tmp_path / name, llama.whole.model).dtype == dtype  # no live model
        found = check(llama.model, llama.tokenizer, llama.compact, back)
        assert 1e-5 < found.relative < 0.1
    with pytest.raises(InvalidArgument, match="float32, bfloat16, float16"):
        to_peft(llama.compact, tmp_path / "no", dtype="float64")


def test_what_the_configuration_says(llama, tmp_path):
    to_peft(llama.compact, tmp_path / "a", base_model="owner/base", revision="v2", frozen=0)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    assert (config["revision"], config["num_frozen_tokens"]) == ("v2", 0)
    assert (config["num_attention_heads"], config["token_dim"]) == (2, 32)  # KV heads
    card = (tmp_path / "a" / "README.md").read_text()
    assert 'base_model: "owner/base"' in card
    assert "source text" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]  # nothing half-written


def test_bias_is_refused_or_fitted_away(llama, far, tmp_path):
    biased = kv.editors.Emphasize(span="60 days", strength=1.0)(llama.whole)
    with pytest.raises(InvalidArgument, match=r"Compile.*refit"):
        to_peft(biased, tmp_path / "a")
    to_peft(biased, tmp_path / "a", refit=lambda memory: llama.whole)
    assert far(llama.logits(from_peft(tmp_path / "a", llama.model)), llama.logits(llama.whole)) == 0
    with pytest.raises(InvalidArgument, match="bias"):  # a refit that leaves some
        to_peft(biased, tmp_path / "b", refit=lambda memory: memory)
    zero = Suppress(span="60 days", strength=0.0)(llama.whole)
    to_peft(zero, tmp_path / "c")
    assert not (tmp_path / "b").exists()


def damaged(folder, case, config=None, tensors=None, metadata=None):
    to_peft(case.compact, folder)
    path = folder / "adapter_config.json"
    if config is not None:
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
    return folder


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"peft_type": "LORA"}, InvalidArgument, "CARTRIDGE or PREFIX_TUNING, found 'LORA'"),
        ({"num_virtual_tokens": 3}, ShapeMismatch, "num_virtual_tokens is 3"),
        ({"num_layers": 7}, ShapeMismatch, "num_layers is 7"),
        ({"num_frozen_tokens": 99}, InvalidArgument, "from 0 to 20, found 99"),
        ({"num_frozen_tokens": "1"}, InvalidArgument, "found '1'"),
        ({"num_transformer_submodules": 2}, InvalidArgument, "encoder"),
        ({"modules_to_save": ["lm_head"]}, InvalidArgument, "modules_to_save"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configurations_that_do_not_fit(llama, tmp_path, config, error, says):
    with pytest.raises(error, match=says):
        from_peft(damaged(tmp_path / "a", llama, config), llama.model)


def test_files_that_do_not_fit(llama, case_of, tmp_path):
    to_peft(llama.compact, tmp_path / "a")
    with pytest.raises(ShapeMismatch, match="made for another model"):
        from_peft(tmp_path / "a", case_of("qwen3").model, strict=False)
    with pytest.raises(IncompatibleModel, match="weights"):
        from_peft(tmp_path / "a", tiny_model("llama", seed=1)[0])
    assert from_peft(tmp_path / "a", tiny_model("llama", seed=1)[0], strict=False).slots == 20
    flat = load_file(tmp_path / "a" / "adapter_model.safetensors")["prompt_embeddings"]
    cases = {
        "one tensor": {"prompt_embeddings": flat, "more": flat.clone()},
        "shape": {"prompt_embeddings": flat[0]},
        "NaN": {"prompt_embeddings": torch.where(flat > 0, flat, torch.nan)},
        "no floating-point": {"prompt_embeddings": flat.long()},
    }
    for says, tensors in cases.items():
        with pytest.raises((InvalidArgument, ShapeMismatch), match=says):
            from_peft(
                damaged(tmp_path / says.replace(" ", ""), llama, tensors=tensors), llama.model
            )
    with pytest.raises(CorruptMemory):
        (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"\x00" * 40)
        from_peft(tmp_path / "a", llama.model)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidArgument, match="safetensors"):
        from_peft(tmp_path / "a", llama.model)
    (tmp_path / "a" / "adapter_config.json").write_text("{" * 5)
    with pytest.raises(CorruptMemory, match="no JSON"):
        from_peft(tmp_path / "a", llama.model)
    with pytest.raises(NotFound, match="is not here"):
        from_peft(tmp_path / "nowhere", llama.model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match="no PEFT adapter"):
        from_peft(tmp_path / "empty", llama.model)


def test_an_edited_memory_that_compiles_is_exported(llama, far, tmp_path):
    """A chain of edits that leaves plain keys and values is as good as any."""
    slots = llama.whole.slots
    edited = Chain(
        (
            kv.editors.Drop(span={"tokens": [6, 20]}),
            kv.editors.ScaleValues(spans=[{"tokens": [2, 5]}], factor=2.0),
            Shift(offset=11),
        )
    )(llama.whole)
    done = to_peft(edited, tmp_path / "a")
    assert (done.slots, done.moved) == (slots - 14, -14 - 11)
    adapted = loaded(llama, tmp_path / "a")
    assert far(forward(adapted, llama.ids), llama.logits(edited)) <= 1e-5


@pytest.mark.slow
def test_peft_on_a_real_model(smollm, far, tmp_path):
    model, tokenizer = smollm
    text = "Refunds are possible within 60 days. Shipping takes three days. " * 20
    whole = kv.capture(model, tokenizer, text)
    compact = kv.editors.Drop(span={"tokens": [8, 200]})(whole)
    ids = tokenizer(" So refunds are possible within", return_tensors="pt").input_ids
    for name, memory in (("whole", whole), ("compact", compact)):
        to_peft(memory, tmp_path / name)
        found = check(model, tokenizer, memory, from_peft(tmp_path / name, model, tokenizer))
        assert found.relative <= 1e-5
        assert found.agree == 1.0
    with kv.attach(model, compact) as session:
        wanted = session.forward(ids)
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "compact")).eval()
    assert far(forward(adapted, ids), wanted) <= 1e-5
