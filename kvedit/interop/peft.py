"""PEFT adapters (``CARTRIDGE``, ``PREFIX_TUNING``): written and read without PEFT itself.

A folder of two files: one tensor ``prompt_embeddings`` ``[p, layers · 2 · KV heads · head size]``
(per virtual token, layer by layer, keys after norm and RoPE, then values) and a configuration.
PEFT puts the first query at position p. ``PREFIX_TUNING`` holds the same tensor, for releases
before 0.19. Contract as of peft 0.21.2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange

from kvedit.errors import CorruptMemory, InvalidArgument, ShapeMismatch
from kvedit.interop.card import PRIVACY, card
from kvedit.interop.exported import Exported
from kvedit.interop.fetching import local_folder
from kvedit.interop.files import new_folder
from kvedit.interop.live import check_made_for, import_node, memory_of, spec_of, use_dtype
from kvedit.interop.prefix import Prefix, Refit, check_frozen, prefix_of
from kvedit.interop.tensors import read_tensors, write_tensors
from kvedit.memory import KVMemory, ModelSpec, Source
from kvedit.memory.digest import digest_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CONFIG", "KINDS", "base_model_of", "from_peft", "to_peft"]

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
KINDS = ("CARTRIDGE", "PREFIX_TUNING")
"""Types of adapter that are a KV cache."""

_TENSOR = "prompt_embeddings"
_FLAT = "slot (layer two head dim)"
_PER_LAYER = "layer two head slot dim"
_WRITTEN_FOR = "0.21.2"

_USE = """\
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
logits = model(**tokenizer("…", return_tensors="pt")).logits
```

The first token of the prompt stands at position {slots}, behind the {slots} virtual tokens. In a
forward pass with left padding, pass `position_ids` that count from 0 at each row's first token.

`model.generate` works with transformers up to 5.23. From 5.24 on, where the cache has another
name, that of PEFT 0.21.2 leaves the virtual tokens out and says nothing. There, and for one row:

```python
ids = tokenizer("…", return_tensors="pt")["input_ids"]
positions = torch.arange({slots}, {slots} + ids.shape[1])[None]
seen = torch.ones(1, {slots} + ids.shape[1])
base_model.generate(
    ids, cache=model.get_prompt(1), position_ids=positions, attention_mask=seen
)
```
"""


def to_peft(
    memory: KVMemory,
    folder: str | os.PathLike[str],
    *,
    kind: Literal["CARTRIDGE", "PREFIX_TUNING"] = "CARTRIDGE",
    frozen: int = 1,
    dtype: torch.dtype | str | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    refit: Refit | None = None,
    overwrite: bool = False,
) -> Exported:
    """Returns what it wrote: a memory as a PEFT adapter.

    Args:
        memory: the memory; keys are turned so that the first query stands at position p.
        folder: the folder to make.
        kind: ``"CARTRIDGE"`` (PEFT 0.19 or later), or ``"PREFIX_TUNING"``.
        frozen: leading slots that PEFT leaves alone in training; ``"CARTRIDGE"`` only.
        dtype: of the file: float32, bfloat16 or float16; None keeps the memory's. PEFT holds
            float32 and casts to the base model's dtype when it is used.
        base_model: name of the base model for PEFT; None takes what the model was loaded as.
        revision: its revision.
        refit: called where the memory has bias: returns it without, values fitted anew.
        overwrite: whether an adapter that is there already is replaced.

    Raises:
        InvalidArgument: if the format can't say what the memory does, or the folder exists.
        UnsupportedModel: if the memory would have to move and can't.
    """
    if kind not in KINDS:
        raise InvalidArgument(f"kind must be {' or '.join(KINDS)}, found {kind!r}")
    prefix = prefix_of(memory, dtype, refit, frozen)
    name = base_model or memory.model.name
    facts = {
        "fingerprint": memory.model.to_json()["fingerprint"],
        "content": memory.digest,
        "moved": prefix.moved,
    }
    with new_folder(folder, overwrite, (CONFIG, WEIGHTS, CARD)) as work:
        write_tensors(work / WEIGHTS, {_TENSOR: _flat(prefix)}, facts)
        config = _config(kind, prefix, memory.model, name, revision)
        (work / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        use = _USE.format(slots=prefix.slots)
        text = card(f"A KV cache of {name}", use, name, "peft", (kind.lower(), "peft"))
        (work / CARD).write_text(text, encoding="utf-8")
    return Exported(Path(folder), "peft", prefix.slots, prefix.moved, (PRIVACY,))


def from_peft(
    place: str | os.PathLike[str],
    model: PreTrainedModel | ModelSpec,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    source: Source | None = None,
    strict: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> KVMemory:
    """Returns the memory of a PEFT adapter: positions 0 to p - 1, the first query at p.

    Args:
        place: the adapter's folder, or a repository on the hub.
        model: the base model, or its facts.
        tokenizer: its tokenizer, for the fingerprint.
        dtype: of keys and values; None takes the model's, as PEFT does when it uses the adapter,
            or the file's where only facts are given.
        source: the text that it stands for, which the format does not hold.
        strict: whether a file of ours must be of this very model; shapes always must fit.
        revision: of a repository.
        token: for a private repository.

    Raises:
        InvalidArgument: if it is no adapter that is a KV cache.
        ShapeMismatch: if it does not fit the model.
        IncompatibleModel: if a file of ours names another model.
        CorruptMemory: if a file can't be read.
    """
    folder, origin = local_folder(place, (CONFIG, WEIGHTS), revision, token)
    config, config_digest = _read_config(folder)
    if not (folder / WEIGHTS).exists():
        raise InvalidArgument(f"{folder} has no {WEIGHTS}: save the adapter with safetensors")
    file = read_tensors(folder / WEIGHTS)
    spec = spec_of(model, tokenizer)
    check_made_for(file.facts, spec, strict, str(folder))
    prefix = _prefix(file.tensors, config, spec, str(folder))
    node = import_node(
        "peft",
        {CONFIG: config_digest, WEIGHTS: file.digest},
        {"kind": str(config["peft_type"]), "frozen": prefix.frozen, **origin},
    )
    return memory_of(prefix, spec, node, use_dtype(model, dtype), source)


def base_model_of(folder: str | os.PathLike[str]) -> str:
    """Returns the base model that an adapter in a folder names; empty if it names none."""
    path = Path(folder)
    config = _read_config(path)[0] if path.is_dir() else {}
    return str(config.get("base_model_name_or_path") or "")


def _flat(prefix: Prefix) -> torch.Tensor:
    states = torch.stack(
        [torch.stack(pair) for pair in zip(prefix.keys, prefix.values, strict=True)]
    )
    return rearrange(states, f"{_PER_LAYER} -> {_FLAT}")


def _config(
    kind: str, prefix: Prefix, spec: ModelSpec, name: str, revision: str | None
) -> dict[str, Any]:
    heads, width = spec.layers[0].kv_heads, spec.layers[0].kv_heads * spec.layers[0].key_dim
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": name,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": heads,  # PEFT means KV heads
        "num_layers": len(spec.layers),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prefix.slots,
        "peft_type": kind,
        "peft_version": _WRITTEN_FOR,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "token_dim": width,
    }
    if kind == "CARTRIDGE":
        return config | {"num_frozen_tokens": prefix.frozen}
    return config | {
        "encoder_hidden_size": width,
        "init_weights": None,
        "prefix_projection": False,
    }


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    path = folder / CONFIG
    if not path.is_file():
        raise InvalidArgument(f"{folder} is no PEFT adapter: it has no {CONFIG}")
    data = path.read_bytes()
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptMemory(f"{path} is no JSON: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise InvalidArgument(
            f"{path}: expected an adapter of type {' or '.join(KINDS)}, found {str(kind)[:40]!r}: "
            "only these are a KV cache"
        )
    if config.get("num_transformer_submodules") not in (None, 1) or config.get("modules_to_save"):
        raise InvalidArgument(
            f"{path}: the adapter is for an encoder–decoder, or changes weights as well "
            "(modules_to_save): it is more than a KV cache"
        )
    return config, digest_bytes(data)


def _prefix(
    tensors: Mapping[str, torch.Tensor], config: dict[str, Any], spec: ModelSpec, where: str
) -> Prefix:
    if set(tensors) != {_TENSOR}:
        raise InvalidArgument(
            f"{where}: expected one tensor {_TENSOR!r}, found {sorted(tensors)[:4]}"
        )
    flat, first = tensors[_TENSOR], spec.layers[0]
    _check_sizes(flat, config, spec, where)
    sizes = {"layer": len(spec.layers), "two": 2, "head": first.kv_heads, "dim": first.key_dim}
    states = rearrange(flat, f"{_FLAT} -> {_PER_LAYER}", **sizes)
    frozen = config.get("num_frozen_tokens", 1) if config["peft_type"] == "CARTRIDGE" else 0
    check_frozen(frozen, flat.shape[0])
    return Prefix(tuple(states[:, 0]), tuple(states[:, 1]), frozen=frozen)


def _check_sizes(flat: torch.Tensor, config: dict[str, Any], spec: ModelSpec, where: str) -> None:
    shapes = {(one.kv_heads, one.key_dim, one.value_dim) for one in spec.layers}
    heads, dim, value_dim = min(shapes)
    if len(shapes) > 1 or dim != value_dim:
        raise InvalidArgument(
            f"{spec.name} has layers of different KV shapes {sorted(shapes)} (KV heads, key size, "
            "value size): PEFT slices or skips some of them, so there is no memory to import"
        )
    if flat.ndim != 2 or flat.shape[1] != 2 * len(spec.layers) * heads * dim:
        found = {key: config.get(key) for key in ("num_layers", "num_attention_heads", "token_dim")}
        width = 2 * len(spec.layers) * heads * dim
        raise ShapeMismatch(
            f"{where}: {_TENSOR} has shape {list(flat.shape)} (its configuration says {found}); "
            f"{spec.name} needs [slots, {width}] for {len(spec.layers)} layers of "
            f"{heads} KV heads of size {dim}: the adapter was made for another model"
        )
    known = {
        "num_virtual_tokens": flat.shape[0],
        "num_layers": len(spec.layers),
        "num_attention_heads": heads,
        "token_dim": heads * dim,
    }
    for key, value in known.items():
        if config.get(key) not in (None, value):
            raise ShapeMismatch(
                f"{where}: {key} is {str(config[key])[:40]} in {CONFIG}; the tensor and "
                f"{spec.name} say {value}"
            )
