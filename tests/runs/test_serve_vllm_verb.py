"""kvedit serve --engine vllm: the command, what it warns of, and what it can't do."""

import json
import os
import shlex

import pytest

import kvedit as kv
from kvedit.models.tiny import tiny_model
from kvedit.runs.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model's files, and a store of its memories."""
    root = tmp_path_factory.mktemp("serve")
    for part in tiny_model("llama"):
        part.save_pretrained(root / "model")
    model, tokenizer = kv.load(root / "model")
    memory = kv.capture(model, tokenizer, "The thing in the box is the answer.")
    with kv.Store(root / "store") as store:
        store.put(memory, "plain")
        store.put(kv.editors.Emphasize(span={"tokens": [2, 5]}, strength=1.0)(memory), "biased")
    return root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("kvedit.serving.vllm.command.cache_folder", lambda: tmp_path)


def test_the_command_is_printed(place, capsys):
    words = ["serve", str(place / "store"), "--engine", "vllm", "--print", "--port", "8123"]
    assert main([*words, "--engine-arg=--enforce-eager"]) == 0
    out, err = capsys.readouterr()
    found = shlex.split(out)
    assert found[found.index("--model") + 1] == str(place / "model")
    assert found[found.index("--dtype") + 1] == "float32" and "--chat-template" in found
    assert found[found.index("--port") + 1] == "8123" and found[-1] == "--enforce-eager"
    extra = json.loads(found[found.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert extra == {"store": str(place / "store"), "capacity": 2 << 30}
    assert "biased will be refused: layer 0: attention bias 1 is not log m" in err


def test_where_vllm_is_it_runs(place, monkeypatch):
    ran = {}

    def execve(path, words, environment):
        ran.update(words=words, key=environment["VLLM_API_KEY"])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr("kvedit.serving.vllm.command.installed_version", lambda: "0.32.0")
    with pytest.raises(SystemExit):
        main(["serve", str(place / "store"), "--engine", "vllm", "--api-key", "secret"])
    assert ran["key"] == "secret" and "secret" not in ran["words"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--no-strict"], "are for --engine hf"),
        (["--model", "tiny:llama"], "has no files"),
        (["--model", "nowhere/at-all"], "can't load the tokenizer"),
    ],
)
def test_what_it_cannot_do(place, capsys, words, says):
    command = ["serve", str(place / "store"), "--engine", "vllm", "--print", *words]
    assert main(command) != 0
    assert says in capsys.readouterr().err
