"""Control vectors in GGUF: our bytes against gguf's own reader and the arithmetic of llama.cpp."""

import warnings

import gguf
import numpy as np
import pytest
import torch

import kvedit as kv
from kvedit.errors import (
    CorruptMemory,
    IncompatibleModel,
    InvalidArgument,
    MissingDependency,
    ShapeMismatch,
)
from kvedit.interop import check_delta, detect, from_delta, from_gguf, to_delta, to_gguf
from kvedit.models.inspection import inspect
from kvedit.models.tiny import tiny_model
from tests.interop.steering_cases import hooked, random_delta, with_residual


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def foreign(path, directions, hint="llama", arch="controlvector", count=None):
    """A file as repeng and llama.cpp's generator write it."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions) if count is None else count)
    for name, vector in directions.items():
        writer.add_tensor(name if isinstance(name, str) else f"direction.{name}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rows(*layers, width=64, dtype=np.float32):
    draw = np.random.default_rng(0)
    return {layer: draw.standard_normal(width).astype(dtype) for layer in layers}


def test_what_others_look_for_is_in_the_file(llama, tmp_path):
    delta = random_delta(*llama)
    done = to_gguf(delta, tmp_path / "v.gguf")
    assert (done.format, detect(done.path)) == ("gguf", "gguf")
    reader = gguf.GGUFReader(done.path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    for tensor in reader.tensors:
        layer = int(tensor.name.split(".")[1])
        assert tensor.tensor_type is gguf.GGMLQuantizationType.F32
        assert torch.equal(torch.tensor(tensor.data), delta.vectors["residual"][layer])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3"])
def test_layers_are_those_of_llama_cpp(family, tmp_path):
    """Its loader fills row N - 1 from direction.N, and block il adds row il - 1 at its end."""
    model, tokenizer = tiny_model(family)
    delta = random_delta(model, tokenizer)
    reader = gguf.GGUFReader(to_gguf(delta, tmp_path / "v.gguf").path)
    width, total = delta.hidden, len(delta.model.layers)
    data = torch.zeros(width * (total - 1))
    for tensor in reader.tensors:
        row = int(tensor.name.removeprefix("direction.")) - 1
        data[row * width : (row + 1) * width] += torch.tensor(tensor.data)
    names = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
    blocks = model.get_submodule(names.get(family, "model.layers"))
    added = [(blocks[il], data[width * (il - 1) : width * il]) for il in range(1, total)]
    ids = tokenizer("The answer is that you wait", return_tensors="pt").input_ids
    with torch.no_grad():
        plain = model(ids).logits
        with hooked(added):
            theirs = model(ids).logits
    ours = with_residual(model, from_gguf(tmp_path / "v.gguf", model, tokenizer), ids)
    assert torch.equal(ours, theirs)
    assert (theirs - plain).abs().max() > 0.1


def test_round_trip_is_equal(llama, tmp_path):
    model, tokenizer = llama
    delta = 2.0 * random_delta(model, tokenizer)
    to_gguf(delta.operand(), tmp_path / "v.gguf")
    for arguments in ((), (model, tokenizer), (model,), (delta.model,)):
        again = from_gguf(tmp_path / "v.gguf", *arguments)
        assert again.digest == delta.digest
        assert dict(again.facts) == dict(delta.facts)
        assert again.lineage.head.operation == "import"
        assert again.lineage.head.inputs == (delta.lineage.head.id,)
        found = check_delta(delta, again)
        assert (found.difference, found.vectors) == (0.0, 2)
    assert kv.Delta.of(again.operand()).digest == delta.digest
    assert "equal bit by bit" in str(found)


def test_the_plain_file(llama, tmp_path):
    model, tokenizer = llama
    delta = random_delta(model, tokenizer, ("keys", "values", "residual", "attention"))
    done = to_delta(delta.operand(), tmp_path / "v.safetensors")
    assert (done.format, detect(done.path)) == ("delta", "delta")
    again = from_delta(done.path, model, tokenizer)
    assert check_delta(delta, again).difference == 0.0
    assert again.digest == delta.digest == from_delta(done.path).digest
    other, _ = tiny_model("llama", seed=1)
    with pytest.raises(IncompatibleModel) as refusal:
        from_delta(done.path, other, tokenizer)
    for one in (model, other):
        assert inspect(one, tokenizer).spec.fingerprint.weights[:12] in str(refusal.value)
    assert from_delta(done.path, other, tokenizer, strict=False).digest == delta.digest
    with pytest.raises(InvalidArgument, match="exists"):
        to_delta(delta, done.path)


def test_another_model_is_refused_with_both_fingerprints(llama, tmp_path):
    model, tokenizer = llama
    other, _ = tiny_model("llama", seed=1)
    to_gguf(random_delta(model, tokenizer), tmp_path / "v.gguf")
    with pytest.raises(IncompatibleModel) as refusal:
        from_gguf(tmp_path / "v.gguf", other, tokenizer)
    for one in (model, other):
        assert inspect(one, tokenizer).spec.fingerprint.weights[:12] in str(refusal.value)
    taken = from_gguf(tmp_path / "v.gguf", other, tokenizer, strict=False)
    assert taken.model.fingerprint == inspect(other, tokenizer).spec.fingerprint


def test_files_of_others(llama, tmp_path):
    model, tokenizer = llama
    written = rows(0, 2)
    path = foreign(tmp_path / "v.gguf", written)
    with pytest.raises(InvalidArgument, match="pass the model"):
        from_gguf(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta = from_gguf(path, model, tokenizer)
    assert delta.layers == (0, 2)
    assert torch.equal(delta.vectors["residual"][2], torch.tensor(written[2]))
    assert delta.model.fingerprint == inspect(model, tokenizer).spec.fingerprint
    with pytest.warns(UserWarning, match="'mistral'.*'llama'"):
        from_gguf(foreign(tmp_path / "m.gguf", written, "mistral"), model, tokenizer)
    half = from_gguf(foreign(tmp_path / "h.gguf", rows(1, dtype=np.float16)), model)
    assert torch.equal(
        half.vectors["residual"][1], torch.tensor(rows(1, dtype=np.float16)[1]).float()
    )


def test_what_does_not_fit_is_refused(llama, tmp_path):
    model, _ = llama

    def refused(error, match, directions, **facts):
        path = foreign(tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", directions, **facts)
        with pytest.raises(error, match=match):
            from_gguf(path, model)

    refused(ShapeMismatch, r"expected a vector \[64\].*found shape \[32\]", rows(1, width=32))
    refused(InvalidArgument, "layer 3, LlamaForCausalLM has 3 layers", rows(3))
    refused(CorruptMemory, "direction.N, found 'directions.1'", {"directions.1": rows(1)[1]})
    refused(CorruptMemory, "one row of F32, found F64", rows(1, dtype=np.float64))
    refused(CorruptMemory, "one row of F32", {1: np.zeros((2, 64), np.float32)})
    refused(InvalidArgument, "found the architecture 'llama'", rows(1), arch="llama")
    broken = rows(1)
    broken[1][5] = np.nan
    refused(InvalidArgument, "NaN", broken)
    with pytest.raises(InvalidArgument, match="no vectors"):
        from_gguf(foreign(tmp_path / "empty.gguf", {}), model)
    with pytest.raises(InvalidArgument, match="missing"):
        from_gguf(tmp_path / "nowhere.gguf", model)


def test_what_the_format_cannot_say(llama, tmp_path):
    file = tmp_path / "v.gguf"
    with pytest.raises(InvalidArgument, match=r"delta.only\(layers=\[1, 2\]\)"):
        to_gguf(random_delta(*llama, layers=(0, 1, 2)), file)
    both = random_delta(*llama, sites=("values", "residual"))
    with pytest.raises(InvalidArgument, match=r"values as well.*only\(sites=\['residual'\]\)"):
        to_gguf(both, file)
    assert not file.exists()
    to_gguf(both.only(sites="residual"), file)
    before = file.read_bytes()
    with pytest.raises(InvalidArgument, match="exists"):
        to_gguf(both.only(sites="residual"), file)
    assert file.read_bytes() == before
    to_gguf(random_delta(*llama, seed=1), file, overwrite=True)
    assert file.read_bytes() != before
    with pytest.raises(InvalidArgument, match="memory of a context"):
        to_gguf(kv.capture(*llama, "That is all."), tmp_path / "w.gguf")


def test_damage_is_found(llama, tmp_path):
    file = to_gguf(random_delta(*llama), tmp_path / "v.gguf").path
    data = file.read_bytes()
    last = bytearray(data)
    last[-40] ^= 1
    named = data.replace(b'"estimator":"mean"', b'"estimator":"mein"')
    assert named != data
    for bad in (data[:-100], data[:200], b"GGUF", b"", bytes(last), named):
        file.write_bytes(bad)
        with pytest.raises(CorruptMemory):
            from_gguf(file)


def test_without_the_package(llama, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependency, match=r"kvedit\[gguf\]"):
        to_gguf(random_delta(*llama), tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())
