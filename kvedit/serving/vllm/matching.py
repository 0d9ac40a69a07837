"""Matching: is a memory of the model that the engine runs, and can that engine take memories.

The engine's model is known by the files that it was started from: the same fingerprint of
configuration, weights and tokenizer that a capture writes into its memories.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.memory import Fingerprint, KVMemory

__all__ = ["ServedModel", "check_fits", "fingerprint_of_files"]


@dataclass(frozen=True)
class ServedModel:
    """The model that an engine runs.

    Args:
        name: what the engine was given.
        fingerprint: of its files.
        dtype: of its keys and values.
    """

    name: str
    fingerprint: Fingerprint
    dtype: torch.dtype


def fingerprint_of_files(name: str, revision: str | None = None) -> Fingerprint:
    """Returns the fingerprint of a model folder or hub id, without its weights in memory.

    Args:
        name: a folder, or a hub id whose files are in the local cache.
        revision: branch, tag or commit of a hub id.

    Raises:
        InvalidArgument: if there are no files of weights to tell the model by.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from kvedit.models.fingerprint import fingerprint, mark_source, weight_files

    folder = _folder(name, revision)
    files = weight_files(folder)
    if not files:
        raise InvalidArgument(
            f"{folder} has no model.safetensors or pytorch_model.bin to tell the model by"
        )
    with torch.device("meta"):  # the shapes alone: the digest is that of the files
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    mark_source(model, files)
    return fingerprint(model, AutoTokenizer.from_pretrained(folder))


def check_fits(memory: KVMemory, model: ServedModel) -> None:
    """Refuses a memory that the engine's model did not make.

    Args:
        memory: the memory, or an outline of it.
        model: what the engine runs.

    Raises:
        IncompatibleModel: with both values of everything that differs.
    """
    made = memory.model.fingerprint
    reasons = [
        f"{name} fingerprint: memory {a[:18] or 'none'}, server {b[:18] or 'none'}"
        for name, (a, b) in made.differences(model.fingerprint).items()
    ]
    if made.weights.startswith("live:"):
        reasons.append(
            "the memory's model was told by its live tensors and not by files: load it by kv.load "
            "from its folder, and capture again"
        )
    if torch.promote_types(memory.dtype, model.dtype) != model.dtype:
        reasons.append(
            f"dtype: memory {memory.dtype}, server {model.dtype}; put memory.to(dtype="
            f"{model.dtype}) to have it rounded"
        )
    if reasons:
        raise IncompatibleModel(
            f"this memory of {memory.model.name} does not fit {model.name}: " + "; ".join(reasons)
        )


def _folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    return Path(str(cached_file(name, "config.json", revision=revision))).parent
