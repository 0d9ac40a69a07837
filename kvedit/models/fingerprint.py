"""Fingerprints: which model, weights, tokenizer and adapters made a memory.

Weights that came from files are told by the files' bytes, so the compute dtype does not matter;
weights that were made or changed in memory are told by the tensors themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from blake3 import blake3

from kvedit.errors import UnsupportedModel
from kvedit.memory.digest import canonical_json, digest_bytes, digest_tensor
from kvedit.memory.files import write_atomically
from kvedit.memory.spec import Fingerprint
from kvedit.models.cache_folder import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "fingerprint",
    "mark_source",
    "state_key",
    "template_digest",
    "tensor_version",
    "tokenizer_fingerprint",
    "weight_files",
]

StateKey = tuple[tuple[str, int, int], ...]

# Settings that change neither weights nor what a position means.
_VOLATILE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

_sources: WeakKeyDictionary[torch.nn.Module, tuple[StateKey, str]] = WeakKeyDictionary()
_tokenizers: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()
_live: WeakKeyDictionary[torch.nn.Module, tuple[StateKey, str]] = WeakKeyDictionary()


def fingerprint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> Fingerprint:
    """Returns the fingerprint of a live model.

    A live hash is kept with the tensors' version counters. A write through ``tensor.data`` moves
    no counter and goes unseen until the tensor is replaced.

    Raises:
        UnsupportedModel: if weights are not in memory (offloaded to disk, on the meta device).
    """
    adapters = _adapter_names(model)
    return Fingerprint(
        config=digest_bytes(canonical_json(_stable_config(model.config.to_dict()))),
        weights=_weights(model, adapters),
        tokenizer=tokenizer_fingerprint(tokenizer) if tokenizer is not None else "",
        adapters=_adapters(model, adapters),
    )


def state_key(model: torch.nn.Module) -> StateKey:
    """Returns a cheap key that changes when a parameter is replaced, moved or written in place."""
    return tuple(
        (name, tensor.data_ptr(), tensor_version(tensor)) for name, tensor in _tensors(model)
    )


def tensor_version(tensor: torch.Tensor) -> int:
    """Returns the tensor's version counter; inference tensors have none, and count as 0."""
    return 0 if tensor.is_inference() else tensor._version


def mark_source(model: PreTrainedModel, files: Iterable[Path]) -> None:
    """Notes that the model's weights, as they are now, came from ``files``."""
    digests = {path.name: _file_digest(path) for path in files}
    _sources[model] = (state_key(model), f"file:{digest_bytes(canonical_json(digests))}")


def weight_files(folder: Path) -> list[Path]:
    """Returns the weight shards of a model folder, or nothing where none is known."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = folder / name
        if index.exists():
            shards = json.loads(index.read_text())["weight_map"].values()
            return [folder / shard for shard in sorted(set(shards))]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
    return []


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the digest of how the tokenizer cuts text: rules, vocabulary, special tokens.

    It is kept until the number of tokens changes, since writing out a vocabulary takes long.
    """
    kept = _tokenizers.get(tokenizer)
    if kept is None or kept[0] != len(tokenizer):
        kept = (len(tokenizer), _read_tokenizer(tokenizer))
        _tokenizers[tokenizer] = kept
    return kept[1]


def _read_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Padding and truncation are settings of the last call.
        rules = {key: rules[key] for key in rules if key not in ("padding", "truncation")}
    else:
        rules = sorted(tokenizer.get_vocab().items())
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return digest_bytes(canonical_json({"rules": rules, "special": special}))


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the digest of the tokenizer's chat template; empty without one."""
    template = tokenizer.chat_template
    return digest_bytes(canonical_json(template)) if template else ""


def _weights(model: PreTrainedModel, adapters: list[str]) -> str:
    key = state_key(model)
    if not adapters and (known := _sources.get(model)) and known[0] == key:
        return known[1]
    if (kept := _live.get(model)) and kept[0] == key:
        return kept[1]
    names = (pair for pair in _tensors(model) if not _of_adapter(pair[0], adapters))
    found = f"live:{_digest_named((name.replace('.base_layer', ''), p) for name, p in names)}"
    _live[model] = (key, found)
    return found


def _adapter_names(model: PreTrainedModel) -> list[str]:
    if not getattr(model, "peft_config", None):
        return []
    # PEFT's layers know which adapters act. The model's own method may be transformers', which
    # refuses to answer for releases of PEFT that are older than it likes.
    for module in model.modules():
        if hasattr(module, "adapter_layer_names"):
            return list(module.active_adapters)
    active = model.active_adapters  # virtual tokens: PEFT's wrapper answers, no layer does
    names = active() if callable(active) else active
    return [names] if isinstance(names, str) else list(names)


def _adapters(model: PreTrainedModel, adapters: list[str]) -> str:
    if not adapters:
        return ""
    weights = ((n, p) for n, p in _tensors(model) if _of_adapter(n, adapters))
    configs = {name: str(model.peft_config[name]) for name in adapters}
    return digest_bytes(canonical_json({"configs": configs, "weights": _digest_named(weights)}))


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields parameters and persistent buffers, each once.

    Raises:
        UnsupportedModel: if weights are packed in something that is no plain tensor.
    """
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and not value.is_quantized:
            yield name, value
        elif name.endswith(("_packed_params", "_packed_params._packed_params")) or isinstance(
            value, torch.Tensor
        ):
            raise UnsupportedModel(
                f"weights {name} are packed by torch's quantisation, so a change of them can't be "
                "seen; use a model whose quantised weights are plain tensors"
            )


def _of_adapter(name: str, adapters: list[str]) -> bool:
    return any(adapter in name.split(".") for adapter in adapters)


def _digest_named(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    found = {}
    for name, tensor in tensors:
        if tensor.is_meta:
            raise UnsupportedModel(
                f"weight {name} is not in memory (offloaded, or on the meta device); load the "
                "model without offloading"
            )
        found[name] = digest_tensor(tensor)
    return digest_bytes(canonical_json(found))


def _stable_config(data: Any) -> Any:
    if isinstance(data, dict):
        return {
            key: _stable_config(value)
            for key, value in data.items()
            if key not in _VOLATILE and not str(key).startswith("_")
        }
    if isinstance(data, list | tuple):
        return [_stable_config(value) for value in data]
    return data if isinstance(data, str | int | float | bool | None) else str(data)


def _file_digest(path: Path) -> str:
    """Full hash of a file, kept in the cache folder under the file's stat."""
    stat = path.resolve().stat()
    identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    kept = cache_folder() / "hashes" / f"{digest_bytes(canonical_json(identity))[:32]}.txt"
    if kept.exists() and len(text := kept.read_text()) == 64:
        return text
    found = blake3(max_threads=os.cpu_count() or 1).update_mmap(path).hexdigest()
    write_atomically(kept, found.encode())
    return found
