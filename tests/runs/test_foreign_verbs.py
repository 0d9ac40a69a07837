"""``export --to`` and ``import --from`` on a tiny model: written, read back, compared, refused."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

import kvedit as kv
from kvedit.models.tiny import tiny_model
from kvedit.runs.cli import main
from kvedit.store import Store

TEXT = "The handbook of the shop. Refunds are possible within 60 days. Shipping takes three days."
MODEL = ("--model", "tiny:llama")


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs a verb in a folder with a store that has ``handbook`` and ``compact``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVEDIT_STORE", raising=False)
    monkeypatch.setenv("KVEDIT_CACHE", str(tmp_path / "cache"))
    model, tokenizer = kv.load("tiny:llama")
    memory = kv.capture(model, tokenizer, TEXT)
    store = Store("memories")
    store.put(memory, "handbook", licence="CC0")
    store.put(kv.editors.Drop(span={"tokens": [4, 20]})(memory), "compact")
    store.put(kv.editors.Emphasize(span="60 days", strength=1.0)(memory), "biased")

    def call(*words):
        code = main(list(words))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def as_json(run, *words):
    code, out, err = run(*words, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(run, *words):
    code, out, err = run(*words)
    assert (code, out) == (1, ""), out
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("form", ["peft", "hazy", "hub", "safetensors"])
def test_out_and_in_again(run, form):
    moves = form in ("peft", "hazy")
    done = as_json(run, "export", "compact", f"out-{form}", "--to", form)
    assert (done["format"], done["name"]) == (form, "compact")
    assert (done["moved"] == -16) == moves
    assert done["check"]["relative"] <= 1e-5
    assert done["check"]["agree"] == 1.0
    assert any("word by word" in note for note in done["notes"])
    named = MODEL if form == "hazy" else ()  # it does not say which model it is for
    back = as_json(run, "import", f"out-{form}", *named)
    assert (back["name"], back["format"]) == (f"out-{form}", form)
    assert back["check"]["difference"] == 0.0
    store = Store("memories")
    memory, original = store.get(back["record"]), store.get("compact")
    assert memory.lineage.head.operation == "import"
    assert memory.next_position == (memory.slots if moves else original.next_position)
    model, tokenizer = kv.load("tiny:llama")
    assert kv.interop.check(model, tokenizer, original, memory).relative <= 1e-5
    assert as_json(run, "ask", f"out-{form}", "So?", "--max-new-tokens", "2")["replies"]
    shown = run("export", "compact", f"again-{form}", "--to", form)[1]
    assert "read back: logits differ by" in shown
    assert ("keys turned by -16 positions" in shown) == moves
    assert "read back" in run("import", f"again-{form}", "--name", "x", *named)[1]


def test_options_reach_the_formats(run):
    words = ("--kind", "prefix-tuning", "--file-dtype", "bfloat16", "--base-model", "me/base")
    done = as_json(run, "export", "compact", "a", "--to", "peft", *words, "--revision", "v1")
    assert done["check"]["relative"] > 1e-5  # rounding shows
    config = json.loads(Path("a/adapter_config.json").read_text())
    assert config["peft_type"] == "PREFIX_TUNING"
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", "v1")
    as_json(run, "export", "compact", "a", "--to", "peft", "--frozen", "0", "--overwrite")
    assert json.loads(Path("a/adapter_config.json").read_text())["num_frozen_tokens"] == 0
    assert "multiple of 16" in refused(
        run, "export", "handbook", "h", "--to", "hazy", "--remainder", "refuse"
    )
    dropped = as_json(run, "export", "handbook", "h", "--to", "hazy", "--remainder", "drop")
    assert dropped["slots"] % 16 == 0
    as_json(run, "export", "handbook", "w", "--to", "hub", "--with-source")
    assert "CC0" in Path("w/README.md").read_text() or "cc0" in Path("w/README.md").read_text()
    there = as_json(run, "import", "w", "--name", "w", "--store", "other")
    assert there["content"] == as_json(run, "show", "handbook")["record"]["content"]
    assert there["licence"] == "CC0"
    as_json(run, "export", "handbook", "s", "--to", "safetensors", "--licence", "mine")
    assert as_json(run, "import", "s", "--no-check")["licence"] == "mine"


def test_refused(run, tmp_path):
    assert "Compile" in refused(run, "export", "biased", "b", "--to", "peft")
    assert not Path("b").exists()
    refused(run, "export", "compact", "b", "--to", "peft", "--model", "tiny:nobody")
    assert "does not fit" in refused(
        run, "export", "compact", "b", "--to", "peft", "--model", "tiny:qwen3"
    )
    assert not Path("b").exists()
    for words in (("--frozen", "2"), ("--push", "me/b"), ("--no-check",), MODEL):
        assert "say which with --to" in refused(run, "export", "compact", "b", *words)
    assert "means nothing to hub" in refused(
        run, "export", "compact", "b", "--to", "hub", "--frozen", "2"
    )
    assert "--push" in refused(
        run, "export", "compact", "b", "--to", "safetensors", "--push", "me/b"
    )
    assert "encrypted" in refused(
        run, "export", "compact", "b", "--to", "hub", "--file-key", "nowhere"
    )
    as_json(run, "export", "compact", "c", "--to", "hazy")
    assert "exists" in refused(run, "export", "compact", "c", "--to", "hazy")
    assert "--model" in refused(run, "import", "c")
    assert "--record" in refused(run, "import", "c", *MODEL, "--record", "0" * 64)
    assert "made for another" in refused(run, "import", "c", "--model", "tiny:qwen3")
    assert "say which with --from" in refused(run, "import", "nowhere", "--no-strict")
    assert "can't be a name" in refused(run, "import", "c", *MODEL, "--name", "no name")
    with pytest.raises(SystemExit) as error:
        run("export", "compact", "d", "--to", "lora")
    assert error.value.code == 2


def test_bias_is_fitted_away_where_that_is_asked_for(run):
    done = as_json(run, "export", "biased", "b", "--to", "peft", "--refit")
    assert 1e-4 < done["check"]["relative"] < 0.5  # the check says what it costs
    assert "keeps the bias" in refused(run, "export", "biased", "h", "--to", "hub", "--refit")
    assert as_json(run, "export", "biased", "h", "--to", "hub")["check"]["difference"] == 0.0


def test_an_encrypted_store_says_so(run, tmp_path):
    pytest.importorskip("cryptography")
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    closed = ("--store", "closed", "--key-file", str(key))
    as_json(run, "export", "compact", "own.kv")
    as_json(run, "import", "own.kv", *closed)
    assert "--plain" in refused(run, "export", "compact", "a", "--to", "hub", *closed)
    assert as_json(run, "export", "compact", "a", "--to", "hub", "--plain", *closed)["check"]


def test_without_a_check_no_model_is_loaded(run, monkeypatch):
    def no(*_):
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("kvedit.runs.verbs.foreign.load_model", no)
        patch.setattr("kvedit.runs.verbs.foreign.load_model_of", no)
        for form in ("peft", "hazy", "hub", "safetensors"):
            done = as_json(run, "export", "compact", f"n-{form}", "--to", form, "--no-check")
            assert done["check"] is None
        for form in ("hub", "safetensors"):
            assert as_json(run, "import", f"n-{form}", "--no-check")["check"] is None


def test_another_model_of_this_shape(run):
    as_json(run, "export", "compact", "a", "--to", "peft")
    other, _ = tiny_model("llama", seed=1)
    assert other.config.num_hidden_layers == 3
    # tiny:llama has the seed 0 always; so the file is changed instead
    path = Path("a/adapter_model.safetensors")
    from kvedit.interop.tensors import read_tensors, write_tensors

    read = read_tensors(path)
    facts = dict(read.facts)
    facts["fingerprint"] = facts["fingerprint"] | {"weights": "live:other"}
    write_tensors(path, read.tensors, facts)
    assert "another model" in refused(run, "import", "a")
    assert as_json(run, "import", "a", "--no-strict")["check"]["difference"] == 0.0


def test_their_pickle_is_imported(run):
    model, tokenizer = kv.load("tiny:llama")
    memory = Store("memories").get("handbook")
    parts = {
        f"trainable_{kind}": torch.nn.ParameterList(
            torch.nn.Parameter(getattr(layer, kind)[None].clone())
            for layer in memory.layers.values()
        )
        for kind in ("keys", "values")
    }
    torch.save(parts, "theirs.pt")  # noqa: TID251 - stands for their code, whose files we read
    back = as_json(run, "import", "theirs.pt", *MODEL)
    assert (back["name"], back["format"]) == ("theirs", "hazy")
    found = kv.interop.check(model, tokenizer, memory, Store("memories").get("theirs"))
    assert found.difference == 0.0


def test_push_and_a_repository(run, tmp_path, monkeypatch):
    class Fake:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, repo_type, private, exist_ok):
            assert private

        def upload_folder(self, folder_path, repo_id, commit_message, revision):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return "hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Fake)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, revision, **_: str(tmp_path / "hub" / name) if revision == "v2" else "",
    )
    code, out, err = run("export", "compact", "a", "--to", "hub", "--push", "me/handbook")
    assert code == 0
    assert "hub/commit" in out
    assert "private" in err
    there = as_json(run, "import", "me/handbook", "--from", "hub", "--revision", "v2")
    assert there["name"] == "handbook"
    assert there["check"]["difference"] == 0.0
