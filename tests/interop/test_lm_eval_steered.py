"""The folder for lm-eval's ``steered`` model: what the card's lines make of it, and its hooks."""

import json

import pytest
import torch

from kvedit.errors import CorruptMemory, IncompatibleModel, InvalidArgument
from kvedit.interop import detect, lm_eval_steered, to_lm_eval
from kvedit.interop.formats import format_of
from kvedit.interop.tensors import read_tensors
from kvedit.models.inspection import inspect
from kvedit.models.tiny import tiny_model
from tests.interop.steering_cases import hooked, random_delta, run_the_card, with_residual

OURS = {"README.md", "steering.json", "steering.safetensors"}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def as_theirs(model, file):
    """Their reading and their hooks in a few lines; lm-eval 0.4.13, ``SteeredModel.__init__``."""
    found = torch.load(file, weights_only=False)  # noqa: TID251 - as their code does
    modules = dict(model.base_model.named_modules())
    behind = []
    for name, info in found.items():
        assert info["action"] == "add"
        assert info.get("bias", None) is None  # they assert it, too
        assert info.get("head_index", None) is None
        vector = info["steering_vector"].to(model.device).to(model.dtype)
        behind.append((modules[name], vector * float(info.get("steering_coefficient", 1.0))))
    return hooked(behind)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3"])
def test_their_hooks_do_what_the_delta_says(family, tmp_path):
    model, tokenizer = tiny_model(family)
    delta = random_delta(model, tokenizer, layers=(0, 2))
    done = to_lm_eval(delta.operand(), tmp_path / "calm", model, tokenizer, strength=-1.5)
    assert (done.format, done.path) == ("lm_eval", tmp_path / "calm")
    assert "padding" in done.notes[1]
    ids = tokenizer("The answer is that you wait", return_tensors="pt").input_ids
    with torch.no_grad():
        plain = model(ids).logits
        with as_theirs(model, run_the_card(done.path)):
            theirs = model(ids).logits
    ours = with_residual(model, -1.5 * delta, ids)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (theirs - plain).abs().max() > 0.1


def test_the_lines_on_the_card_make_their_file(llama, tmp_path):
    model, tokenizer = llama
    delta = random_delta(model, tokenizer, sites=("residual", "attention"), layers=(1, 2))
    done = to_lm_eval(delta, tmp_path / "calm", model, strength=0.1)
    assert {file.name for file in done.path.iterdir()} == OURS  # no pickle by us
    made = run_the_card(done.path)
    assert made.name == "steering.pt"
    found = torch.load(made, weights_only=True)  # noqa: TID251 - stricter than their code
    sites = {"layers.{}": "residual", "layers.{}.self_attn": "attention"}
    wanted = {name.format(i): (site, i) for name, site in sites.items() for i in (1, 2)}
    assert set(found) == set(wanted)
    for name, (site, layer) in wanted.items():
        vector = found[name].pop("steering_vector")
        assert torch.equal(vector, delta.vectors[site][layer])
        assert found[name] == {
            "action": "add",
            "steering_coefficient": 0.1,
            "bias": None,
            "head_index": None,
        }
        assert type(found[name]["steering_coefficient"]) is float


def test_the_folder_says_what_it_is(llama, tmp_path):
    model, tokenizer = llama
    delta = random_delta(model, tokenizer)
    folder = to_lm_eval(delta, tmp_path / "calm", model, tokenizer, strength=2).path
    facts = read_tensors(folder / "steering.safetensors").facts
    spec = inspect(model, tokenizer).spec
    assert facts == {"content": delta.digest, "fingerprint": spec.to_json()["fingerprint"]}
    card = (folder / "README.md").read_text()
    assert "2 steering vectors" in card
    assert "`layers.1.steering_vector`" in card
    assert "source text" not in card  # vectors are no keys and values of a text
    assert "cartridge" not in card
    assert detect(folder) == "lm_eval"
    with pytest.raises(InvalidArgument, match="written only"):
        format_of("lm_eval").read(folder)


def test_whole_or_not_at_all(llama, tmp_path, monkeypatch):
    model, tokenizer = llama
    delta = random_delta(model, tokenizer)
    folder = to_lm_eval(delta, tmp_path / "calm", model, strength=1.0).path
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InvalidArgument, match="exists"):
        to_lm_eval(delta, folder, model)
    write = lm_eval_steered.write_tensors

    def full(*arguments, **options):
        raise OSError("no space left")

    def damaging(path, tensors, facts):
        write(path, {name: one + 1 for name, one in tensors.items()}, facts)

    cases = (("card", full, OSError), ("write_tensors", damaging, CorruptMemory))
    for name, broken, error in cases:
        with monkeypatch.context() as patch:
            patch.setattr(lm_eval_steered, name, broken)
            for place in (tmp_path / "new", folder):
                with pytest.raises(error):
                    to_lm_eval(delta, place, model, strength=3.0, overwrite=True)
    assert [one.name for one in tmp_path.iterdir()] == ["calm"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    to_lm_eval(delta, folder, model, strength=3.0, overwrite=True)
    assert {file.name for file in folder.iterdir()} == OURS
    hooks = json.loads((folder / "steering.json").read_text())
    assert {hook["steering_coefficient"] for hook in hooks.values()} == {3.0}
    run_the_card(folder)
    with pytest.raises(InvalidArgument, match=r"steering\.pt"):  # not ours to remove
        to_lm_eval(delta, folder, model, overwrite=True)


def test_refused(llama, tmp_path):
    model, tokenizer = llama
    delta = random_delta(model, tokenizer)
    place = tmp_path / "calm"
    for name in ("v.pt", "v.pth"):
        with pytest.raises(InvalidArgument, match="no pickle"):
            to_lm_eval(delta, tmp_path / name, model)
    with pytest.raises(InvalidArgument, match="finite"):
        to_lm_eval(delta, place, model, strength=float("nan"))
    with pytest.raises(InvalidArgument, match="keys as well"):
        to_lm_eval(random_delta(model, tokenizer, ("keys", "residual")), place, model)
    other, _ = tiny_model("llama", seed=1)
    with pytest.raises(IncompatibleModel) as refusal:
        to_lm_eval(delta, place, other, tokenizer)
    for one in (model, other):
        assert inspect(one, tokenizer).spec.fingerprint.weights[:12] in str(refusal.value)
    wide, _ = tiny_model("gemma2")  # 96
    with pytest.raises(InvalidArgument, match="hidden size of 96"):
        to_lm_eval(delta, place, wide, strict=False)
    assert not list(tmp_path.iterdir())
    to_lm_eval(delta, place, other, strict=False)
