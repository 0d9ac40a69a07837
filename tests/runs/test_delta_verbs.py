"""``export --to`` and ``import --from`` of steering deltas: written, read back, refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kvedit as kv
from kvedit.runs.cli import main
from kvedit.store import Store
from tests.interop.steering_cases import random_delta

MODEL = ("--model", "tiny:llama")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store with two deltas and a memory, to be copied."""
    model, tokenizer = kv.load("tiny:llama")
    folder = tmp_path_factory.mktemp("filled") / "memories"
    with Store(folder) as store:
        store.put(random_delta(model, tokenizer).operand(), "calm")
        store.put(random_delta(model, tokenizer, ("values", "residual")).operand(), "wide")
        store.put(kv.capture(model, tokenizer, "That is all."), "handbook")
    return folder


@pytest.fixture
def run(filled, tmp_path, capsys, monkeypatch):
    """Runs a verb in a folder with a store that has the delta ``calm``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVEDIT_STORE", raising=False)
    monkeypatch.setenv("KVEDIT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(filled, "memories")

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


def delta_of(name):
    return kv.Delta.of(Store("memories").get(name))


def test_gguf_out_and_in(run):
    done = as_json(run, "export", "calm", "calm.gguf", "--to", "gguf")
    assert (done["sites"], done["layers"]) == (["residual"], [1, 2])
    assert done["check"] == {"difference": 0.0, "largest": done["check"]["largest"],
                             "vectors": 2, "relative": 0.0}  # fmt: skip
    for words in ((), ("--from", "gguf"), MODEL, ("--no-strict", "--model", "tiny:qwen3")):
        back = as_json(run, "import", "calm.gguf", "--name", "again", *words)
        assert (back["format"], back["check"]["difference"]) == ("gguf", 0.0)
        same = "tiny:qwen3" not in words
        assert (delta_of("again").digest == delta_of("calm").digest) == same
    shown = run("export", "calm", "calm.gguf", "--to", "gguf", "--overwrite")[1]
    assert "residual of 2 layers" in shown
    assert "read back: 2 vectors, equal bit by bit" in shown
    assert "equal bit by bit" in run("import", "calm.gguf", "--name", "x")[1]


def test_plain_file_out_and_in(run):
    done = as_json(run, "export", "wide", "wide.safetensors", "--to", "delta")
    assert (done["sites"], done["check"]["difference"]) == (["values", "residual"], 0.0)
    back = as_json(run, "import", "wide.safetensors", "--name", "again", *MODEL)
    assert (back["format"], back["check"]["vectors"]) == ("delta", 4)
    assert delta_of("again").digest == delta_of("wide").digest
    assert "was made for another model" in refused(
        run, "import", "wide.safetensors", "--model", "tiny:qwen3"
    )
    as_json(run, "import", "wide.safetensors", "--no-strict", "--model", "tiny:qwen3")
    assert "exists" in refused(run, "export", "calm", "wide.safetensors", "--to", "delta")
    as_json(run, "export", "calm", "wide.safetensors", "--to", "delta", "--overwrite")
    assert "memory of a context" in refused(run, "export", "handbook", "h", "--to", "delta")


def test_lm_eval_out(run):
    words = ("export", "calm", "folder", "--to", "lm_eval", *MODEL)
    done = as_json(run, *words, "--strength", "2.5")
    assert done["check"] is None  # the export itself reads it back
    hooks = json.loads(Path("folder/steering.json").read_text())
    assert sorted(hooks) == ["layers.1", "layers.2"]
    assert hooks["layers.1"]["steering_coefficient"] == 2.5
    found = load_file("folder/steering.safetensors")["layers.1.steering_vector"]
    assert torch.equal(found, delta_of("calm").vectors["residual"][1])
    assert "exists" in refused(run, *words)
    assert "README.md has the lines" in run(*words, "--overwrite")[1]
    assert "--push" in refused(run, *words, "--overwrite", "--push", "me/calm")
    assert "writes no pickle" in refused(run, "export", "calm", "c.pt", "--to", "lm_eval", *MODEL)
    for more in ((), MODEL):
        assert "lm_eval is written only" in refused(run, "import", "folder", *more)


@pytest.mark.parametrize("form", ["safetensors", "hub", "peft", "hazy"])
def test_formats_of_memories_send_deltas_on(run, form):
    said = refused(run, "export", "calm", "out", "--to", form)
    assert "calm is a steering delta" in said
    assert "--to delta writes it whole, --to gguf or lm_eval for others" in said
    assert not Path("out").exists()


def test_svec_in(run):
    rows = torch.randn(64, generator=torch.Generator().manual_seed(0))
    data = {"model_type": "llama", "directions": {"1": rows.tolist()}}
    Path("calm.svec").write_text(json.dumps(data | {"explained_variances": {"1": 0.5}}))
    assert "name it (--model)" in refused(run, "import", "calm.svec")
    back = as_json(run, "import", "calm.svec", *MODEL)
    assert (back["name"], back["check"]["difference"]) == ("calm", 0.0)
    assert torch.equal(delta_of("calm").vectors["residual"][1], rows)
    assert "no more than a model type" in refused(run, "import", "calm.svec", "--no-strict", *MODEL)


def test_refused(run):
    assert "memory of a context" in refused(run, "export", "handbook", "h.gguf", "--to", "gguf")
    assert "values as well" in refused(run, "export", "wide", "w.gguf", "--to", "gguf")
    assert not list(Path().glob("*.gguf"))
    for words in (("--frozen", "2"), ("--strength", "2"), ("--licence", "x"), ("--refit",)):
        assert "means nothing to gguf" in refused(
            run, "export", "calm", "c", "--to", "gguf", *words
        )
    assert "without a model" in refused(run, "export", "calm", "c", "--to", "gguf", *MODEL)
    assert "means nothing to hub" in refused(
        run, "export", "handbook", "h", "--to", "hub", "--strength", "2"
    )
    assert "say which with --to" in refused(run, "export", "calm", "c", "--strength", "2")
    seen = refused(run, "export", "calm", "c", "--to", "lm_eval", "--model", "tiny:qwen3")
    assert "fingerprints differ" in seen
    as_json(run, "export", "calm", "c", "--to", "lm_eval", "--no-strict", "--model", "tiny:qwen3")
    as_json(run, "export", "calm", "calm.gguf", "--to", "gguf")
    seen = refused(run, "import", "calm.gguf", "--model", "tiny:qwen3")
    assert "was made for another model" in seen
    assert "--revision" in refused(run, "import", "calm.gguf", "--revision", "v1")
