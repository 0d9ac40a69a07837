"""The plain file and the hub folder hold a memory whole; the hub itself is a fake here."""

import dataclasses
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import kvedit as kv
from kvedit.errors import (
    CorruptMemory,
    IncompatibleModel,
    InvalidArgument,
    NotFound,
    ShapeMismatch,
    TierUnavailable,
)
from kvedit.interop import (
    from_hub,
    from_safetensors,
    push_folder,
    push_to_hub,
    to_hub,
    to_peft,
    to_safetensors,
)
from kvedit.interop.live import imported_facts
from kvedit.models.tiny import tiny_model


@pytest.fixture
def rich(llama):
    """Bias, eviction, ragged layers, a rule, a chat: all that other formats can't say."""
    chat = [{"role": "system", "content": "The refund window is 60 days. That is all we know."}]
    memory = kv.capture(llama.model, llama.tokenizer, chat)
    edits = (
        kv.editors.Emphasize(span="60 days", strength=1.5, layers=[0]),
        kv.editors.Suppress(span="That is", strength=float("inf"), kv_heads=[1]),
        kv.editors.Drop(span="all we know", layers=[2]),
        kv.editors.SpotLight(spans=["60 days"], target=0.3),
    )
    for edit in edits:
        memory = edit(memory)
    return memory


def written(form, memory, path, **options):
    done = (to_hub if form == "hub" else to_safetensors)(memory, path, **options)
    assert done.format == form
    return path


def read(form, path, *arguments, **options):
    return (from_hub if form == "hub" else from_safetensors)(path, *arguments, **options)


@pytest.mark.parametrize("form", ["hub", "safetensors"])
def test_bit_by_bit(llama, rich, tmp_path, form):
    path = written(form, rich, tmp_path / "a", source=True, licence="MIT")
    back = read(form, path, llama.model, llama.tokenizer)
    assert back.digest == rich.digest  # tensors, positions, bias, rules, tokens, model
    assert back.source.chat == rich.source.chat
    assert back.lineage.nodes[:-1] == rich.lineage.nodes
    node = back.lineage.head
    assert (node.operation, node.name, node.inputs) == ("import", form, (rich.lineage.head.id,))
    assert imported_facts(back)["licence"] == "MIT"
    assert read(form, path).digest == rich.digest  # the model is not needed
    with kv.attach(llama.model, rich) as one, kv.attach(llama.model, back) as other:
        assert torch.equal(one.forward(llama.ids), other.forward(llama.ids))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("form", ["hub", "safetensors"])
def test_without_the_source_no_text_is_written(llama, tmp_path, form):
    path = written(form, llama.whole, tmp_path / "a")
    files = [path] if path.is_file() else list(path.iterdir())
    assert all(b"refund" not in file.read_bytes() for file in files)
    back = read(form, path, llama.model, llama.tokenizer)
    assert back.source is None
    assert set(back.layers[0].source.tolist()) == {-1}
    assert torch.equal(llama.logits(back), llama.logits(llama.whole))
    told = read(form, path, llama.model, llama.tokenizer, source=llama.whole.source)
    assert told.source is llama.whole.source


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("form", ["hub", "safetensors"])
def test_losslessness_control(case_of, far, tmp_path, family, form):
    case = case_of(family)
    for which in ("whole", "compact"):  # learned positions as well: nothing is moved
        back = read(form, written(form, case.memory(which), tmp_path / which), case.model)
        assert torch.equal(case.logits(back), case.logits(case.memory(which)))
    whole = read(form, tmp_path / "whole", case.model)
    assert far(case.logits(whole), case.full_context_logits()) <= 1e-5


@pytest.mark.parametrize("form", ["hub", "safetensors"])
def test_another_model_is_refused(llama, case_of, tmp_path, form):
    path = written(form, llama.whole, tmp_path / "a")
    other, tokenizer = tiny_model("llama", seed=1)
    with pytest.raises(IncompatibleModel, match="weights"):
        read(form, path, other, tokenizer)
    assert read(form, path, other, strict=False).slots == llama.whole.slots
    with pytest.raises(IncompatibleModel, match="key_dim"):
        read(form, path, case_of("qwen3").model, strict=False)


@pytest.mark.parametrize("form", ["hub", "safetensors"])
def test_the_dtype_is_the_models(llama, tmp_path, form):
    half, tokenizer = tiny_model("llama", dtype=torch.bfloat16)
    path = written(form, llama.whole, tmp_path / "a")
    assert read(form, path, half, tokenizer, strict=False).dtype == torch.bfloat16
    assert read(form, path, llama.model, dtype="float16").dtype == torch.float16
    assert read(form, path).dtype == torch.float32


def test_a_changed_folder_is_found(llama, tmp_path):
    def fresh():
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        to_hub(llama.whole, tmp_path / "a", source=True)
        manifest = tmp_path / "a" / "memory.json"
        return manifest, json.loads(manifest.read_text())

    changes = {
        "next_position": 999,
        "rules": [{"rule": "gate", "version": 1}],
        "content": "0" * 64,
        "model": {},
        "lineage": [{}],
        "source": None,
    }
    for key, value in changes.items():
        manifest, facts = fresh()
        manifest.write_text(json.dumps(facts | {key: value}))
        with pytest.raises(CorruptMemory):
            from_hub(tmp_path / "a", llama.model)
    manifest, facts = fresh()
    for text in ("[" * 100_000, "[]", "nonsense"):
        manifest.write_text(text)
        with pytest.raises(CorruptMemory):
            from_hub(tmp_path / "a")
    manifest.write_text(json.dumps(facts | {"format": "kvedit.open.9"}))
    with pytest.raises(InvalidArgument, match=r"kvedit\.open\.1"):
        from_hub(tmp_path / "a")
    fresh()
    path = tmp_path / "a" / "memory.safetensors"
    tensors = load_file(path)
    tensors["layers.1.values"][0, 3, 2] += 1e-3
    save_file(tensors, path)
    with pytest.raises(CorruptMemory, match="was changed"):
        from_hub(tmp_path / "a")
    save_file(tensors | {"layers.1.extra": torch.zeros(1)}, path)
    with pytest.raises(CorruptMemory, match="nobody knows"):
        from_hub(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptMemory):
        from_hub(tmp_path / "a")
    path.unlink()
    with pytest.raises(InvalidArgument, match="missing"):
        from_hub(tmp_path / "a")
    (tmp_path / "a" / "memory.json").unlink()
    with pytest.raises(InvalidArgument, match="no memory"):
        from_hub(tmp_path / "a")


def test_a_file_of_others(llama, far, tmp_path):
    plain = kv.capture(llama.model, None, llama.whole.tokens[:12])
    tensors = {
        f"layers.{index}.{kind}": getattr(layer, kind).contiguous()
        for index, layer in plain.layers.items()
        for kind in ("keys", "values")
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InvalidArgument, match="pass the model"):
        from_safetensors(tmp_path / "a.safetensors")
    back = from_safetensors(tmp_path / "a.safetensors", llama.model, llama.tokenizer)
    assert far(llama.logits(back), llama.logits(plain)) == 0
    assert back.next_position == 12
    del tensors["layers.1.values"]
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(InvalidArgument, match=r"layers\.1\.values"):
        from_safetensors(tmp_path / "b.safetensors", llama.model)
    del tensors["layers.1.keys"], tensors["layers.2.keys"], tensors["layers.2.values"]
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(InvalidArgument, match="1 layers"):
        from_safetensors(tmp_path / "c.safetensors", llama.model)
    wide = {name: tensor.repeat(1, 1, 2) for name, tensor in tensors.items()}
    save_file({**wide, "layers.1.keys": wide["layers.0.keys"] + 0}, tmp_path / "d.safetensors")
    with pytest.raises(InvalidArgument):
        from_safetensors(tmp_path / "d.safetensors", llama.model)
    three = {
        f"layers.{i}.{k}": wide[f"layers.0.{k}"] + 0 for i in range(3) for k in ("keys", "values")
    }
    save_file(three, tmp_path / "e.safetensors")
    with pytest.raises(ShapeMismatch, match="dim=16"):
        from_safetensors(tmp_path / "e.safetensors", llama.model)
    (tmp_path / "f.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(CorruptMemory):
        from_safetensors(tmp_path / "f.safetensors", llama.model)


def test_a_memory_changed_in_place_is_not_written(llama, tmp_path):
    layer = llama.whole.layers[0]
    mine = dataclasses.replace(layer, keys=layer.keys.clone())
    memory = llama.whole.with_layers({0: mine})
    mine.keys[0, 0, 0] = 9.0
    for write in (to_hub, to_safetensors, to_peft):
        with pytest.raises(kv.errors.MutatedMemory):
            write(memory, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_card(llama, tmp_path):
    edited = kv.editors.Emphasize(span="60 days", strength=1.0)(llama.whole)
    to_hub(edited, tmp_path / "a", licence="house rules")
    card = (tmp_path / "a" / "README.md").read_text()
    front = card.split("---")[1]
    import yaml

    facts = yaml.safe_load(front)
    assert facts["library_name"] == "kvedit"
    assert (facts["license"], facts["license_name"]) == ("other", "house rules")
    assert "cartridge" in facts["tags"]
    assert "word by word" in card  # the warning
    assert "in 3 layers" in card  # of the bias
    assert "emphasize" in card
    assert edited.slots == llama.whole.slots


class FakeHub:
    """What the real client would do, on a folder."""

    root: Path
    calls: list

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, repo_type, private, exist_ok):
        self.calls.append(("create", repo_id, repo_type, private, exist_ok, self.token))
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, folder_path, repo_id, commit_message, revision):
        self.calls.append(("upload", repo_id, commit_message, revision))
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return huggingface_hub.CommitInfo(
            commit_url=f"hub/{repo_id}/commit/1", commit_message="", commit_description="", oid="1"
        )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    FakeHub.root, FakeHub.calls = tmp_path / "hub", []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)

    def download(repo_id, revision, token, allow_patterns):
        FakeHub.calls.append(("download", repo_id, revision, token))
        snapshot = tmp_path / "snapshots" / "c0ffee"
        shutil.copytree(FakeHub.root / repo_id, snapshot, dirs_exist_ok=True)
        for file in snapshot.iterdir():
            if file.name not in allow_patterns:
                file.unlink()
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return FakeHub


def test_pushed_and_fetched(llama, hub, tmp_path):
    url = push_to_hub(llama.whole, "me/handbook", source=True, token="t", revision="main")
    assert url == "hub/me/handbook/commit/1"
    assert hub.calls[0] == ("create", "me/handbook", "model", True, True, "t")  # private
    assert hub.calls[1][3] == "main"
    names = sorted(file.name for file in (hub.root / "me/handbook").iterdir())
    assert names == ["README.md", "memory.json", "memory.safetensors"]
    back = from_hub("me/handbook", llama.model, llama.tokenizer, revision="v1", token="u")
    assert hub.calls[-1] == ("download", "me/handbook", "v1", "u")
    assert back.digest == llama.whole.digest
    assert imported_facts(back)["repository"] == "me/handbook"
    assert imported_facts(back)["commit"] == "c0ffee"
    to_peft(llama.compact, tmp_path / "adapter")
    push_folder(tmp_path / "adapter", "me/adapter", private=False)
    assert hub.calls[-2][3] is False
    assert (hub.root / "me/adapter/adapter_config.json").exists()


def test_the_hub_says_no(llama, tmp_path, monkeypatch):
    with pytest.raises(TierUnavailable, match="did not take"):  # tests are offline
        push_to_hub(llama.compact, "me/handbook")
    with pytest.raises(InvalidArgument, match="can't be a repository"):
        push_to_hub(llama.compact, "not//a name")
    with pytest.raises(NotFound, match="could be fetched"):
        from_hub("me/no-such-memory")
    with pytest.raises(NotFound, match="owner/name"):
        from_hub(tmp_path / "nowhere")
    to_safetensors(llama.compact, tmp_path / "file")
    with pytest.raises(InvalidArgument, match="name the folder"):
        from_hub(tmp_path / "file")
