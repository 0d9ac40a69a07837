"""The command is complete, and says beforehand what the server will refuse."""

import json
from pathlib import Path

import pytest

import kvedit as kv
from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.models.tiny import tiny_model
from kvedit.serving.vllm import command, vllm_command, vllm_problems
from kvedit.serving.vllm.versions import VLLM, check_version


def test_the_words(tmp_path):
    words = vllm_command(
        tmp_path, "folder", port=8001, dtype="float32", verify="deep", python="python",
        arguments=("--enforce-eager",),
    )  # fmt: skip
    assert words[:5] == ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "folder"]
    assert words[words.index("--port") + 1] == "8001"
    assert words[words.index("--dtype") + 1] == "float32"
    assert "--enable-prefix-caching" in words and "--enable-prompt-tokens-details" in words
    assert "--host" not in words and words[-1] == "--enforce-eager"
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer["kv_role"] == "kv_consumer"
    assert transfer["kv_connector_extra_config"] == {"store": str(tmp_path), "verify": "deep"}
    with pytest.raises(InvalidArgument, match=r"unknown options .'ports'"):
        vllm_command(tmp_path, "folder", ports=1)


def test_the_template_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "cache_folder", lambda: tmp_path)
    _, tokenizer = tiny_model("llama")
    words = vllm_command("memories", "folder", tokenizer=tokenizer)
    file = Path(words[words.index("--chat-template") + 1])
    assert "memory_slots" in file.read_text()
    before = file.stat().st_mtime_ns
    assert words == vllm_command("memories", "folder", tokenizer=tokenizer)
    assert file.stat().st_mtime_ns == before
    tokenizer.chat_template = None
    assert "--chat-template" not in vllm_command("memories", "folder", tokenizer=tokenizer)


def test_what_will_be_refused_is_named(tmp_path):
    model, tokenizer = tiny_model("llama")
    store = kv.Store(tmp_path)
    assert "has no memories" in next(vllm_problems(store))
    memory = kv.capture(model, tokenizer, "The thing in the box is the answer.")
    store.put(memory, "plain")
    store.put(kv.editors.Emphasize(span={"tokens": [2, 5]}, strength=1.3)(memory), "biased")
    (problem,) = vllm_problems(store)
    assert problem.startswith("biased will be refused: layer 0: attention bias 1.3 is not log m")


def test_another_version_is_refused(monkeypatch):
    check_version(f"{VLLM}+cpu")
    with pytest.raises(UnsupportedModel, match=f"tested with vLLM {VLLM}, this is 0.33.0"):
        check_version("0.33.0")
    monkeypatch.setattr(command.importlib.metadata, "version", lambda name: "0.31.9")
    with pytest.raises(UnsupportedModel, match=r"0\.31\.9"):
        command.installed_version()
