"""The read-back check says how far two memories are apart, and telling formats apart works."""

import json

import pytest
import torch

import kvedit as kv
from kvedit.errors import ContextTooLong, IncompatibleModel, InvalidArgument
from kvedit.interop import check, detect, to_hazy, to_hub, to_peft, to_safetensors
from kvedit.interop.checking import PROBE
from kvedit.interop.files import new_file, new_folder
from kvedit.interop.formats import FORMATS, format_of
from kvedit.models.tiny import tiny_model


def test_check_is_the_difference_of_logits(llama):
    other = kv.editors.ScaleValues(spans=[{"tokens": [4, 9]}], factor=1.5)(llama.whole)
    ids = llama.tokenizer(PROBE, add_special_tokens=False, return_tensors="pt").input_ids
    one, two = llama.logits(llama.whole, ids)[0], llama.logits(other, ids)[0]
    found = check(llama.model, llama.tokenizer, llama.whole, other)
    assert float(found) == found.difference == float((one - two).abs().max()) > 0.01
    assert found.largest == float(one.abs().max())
    assert found.relative == found.difference / found.largest
    assert found.probes == ids.shape[1]
    assert found.agree == float((one.argmax(-1) == two.argmax(-1)).float().mean()) < 1
    assert "logits differ by" in str(found)
    same = check(llama.model, None, llama.whole, llama.whole)  # random tokens
    assert (same.difference, same.agree, same.probes) == (0.0, 1.0, 24)
    three = check(llama.model, None, llama.whole, other, probes=torch.tensor([5, 6, 7]))
    assert three.probes == 3


def test_check_keeps_within_the_model(llama):
    model, tokenizer = tiny_model("llama", rope="dynamic")  # 64 positions, then other frequencies
    ids = llama.whole.tokens
    assert len(ids) > 60
    memory = kv.capture(model, None, ids[:60])
    assert check(model, tokenizer, memory, memory).probes == 4
    full = kv.capture(model, None, ids[:1].repeat(64))
    with pytest.raises(ContextTooLong, match="no token fits"):
        check(model, tokenizer, full, full)
    with pytest.raises(IncompatibleModel):
        check(llama.model, llama.tokenizer, memory, memory)


def test_formats_are_told_apart(llama, tmp_path):
    to_peft(llama.compact, tmp_path / "peft")
    to_hazy(llama.compact, tmp_path / "hazy")
    to_hub(llama.compact, tmp_path / "hub")
    to_safetensors(llama.compact, tmp_path / "safetensors")
    for name in (name for name, form in FORMATS.items() if not form.delta):
        assert detect(tmp_path / name) == name
    assert detect(tmp_path / "hazy" / "cartridge.safetensors") == "hazy"
    (tmp_path / "a.pt").write_bytes(b"PK")
    assert detect(tmp_path / "a.pt") == "hazy"
    store = kv.Store(tmp_path / "store")
    store.put(llama.compact, "mine")
    store.export("mine", tmp_path / "own.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").write_bytes(b"\xff" * 99)
    (tmp_path / "list").write_bytes((4).to_bytes(8, "little") + b"[[]]")
    header = json.dumps({"__metadata__": 3}).encode()
    (tmp_path / "meta").write_bytes(len(header).to_bytes(8, "little") + header)
    for name in ("own.safetensors", "empty", "odd", "list", "meta", "store", "nowhere", "no.pt"):
        assert detect(tmp_path / name) is None
    with pytest.raises(kv.errors.UnknownName, match="peft"):
        format_of("pefd")


def test_what_fails_leaves_nothing(tmp_path):
    def fill(path):
        (path / "a").write_text("new")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError), new_folder(tmp_path / "x", False, ("a",)) as work:
        fill(work)
    with pytest.raises(RuntimeError), new_file(tmp_path / "y", False) as path:
        path.write_text("new")
        raise RuntimeError("half way")
    assert not list(tmp_path.iterdir())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "x", True, ("a",)) as work:
        fill(work)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "a").read_text() == "old"


def test_what_is_there_is_kept_unless_told(llama, case_of, tmp_path):
    place = tmp_path / "a"
    to_peft(llama.compact, place)
    with pytest.raises(InvalidArgument, match="exists"):
        to_peft(llama.whole, place)
    assert to_peft(llama.whole, place, overwrite=True).slots == llama.whole.slots
    assert json.loads((place / "adapter_config.json").read_text())["num_virtual_tokens"] > 20
    (place / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidArgument, match=r"thesis\.txt"):
        to_peft(llama.compact, place, overwrite=True)
    assert (place / "thesis.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidArgument, match="exists"):
        to_hub(llama.compact, tmp_path / "link")
    with pytest.raises(InvalidArgument, match="no folder"):
        to_hub(llama.compact, tmp_path / "link", overwrite=True)
    with pytest.raises(InvalidArgument, match="make it first"):
        to_hub(llama.compact, tmp_path / "no" / "a")
    file = tmp_path / "file"
    to_safetensors(llama.compact, file)
    before = file.read_bytes()
    for target in (file, place, tmp_path / "no" / "file"):
        with pytest.raises(InvalidArgument, match="exists"):
            to_safetensors(llama.whole, target)
    assert file.read_bytes() == before
    to_safetensors(llama.whole, file, overwrite=True)
    assert file.read_bytes() != before
    with pytest.raises(InvalidArgument, match="exists"):
        to_safetensors(llama.whole, place, overwrite=True)  # a folder is not replaced by a file
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a", "link", "file"}
    assert file.stat().st_mode & 0o077 == 0  # as private as the text


def test_one_memory_makes_the_same_files(llama, tmp_path):
    for name in ("one", "two"):
        to_peft(llama.compact, tmp_path / f"peft-{name}")
        to_hazy(llama.compact, tmp_path / f"hazy-{name}")
        to_hub(llama.compact, tmp_path / f"hub-{name}", source=True)
    for form in ("peft", "hazy", "hub"):
        for file in (tmp_path / f"{form}-one").iterdir():
            assert file.read_bytes() == (tmp_path / f"{form}-two" / file.name).read_bytes()
