"""One safetensors file: ``layers.{i}.keys`` and so on, and the rest as JSON in its header."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.interop.card import PRIVACY
from kvedit.interop.document import document, tensors, to_memory, without_source
from kvedit.interop.exported import Exported
from kvedit.interop.files import new_file
from kvedit.interop.live import import_node, memory_of, spec_of, use_dtype
from kvedit.interop.prefix import Prefix
from kvedit.interop.tensors import TensorFile, read_tensors, write_tensors
from kvedit.memory import KVMemory, Lineage, ModelSpec, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["admitted", "from_safetensors", "to_safetensors"]

_KEYS = re.compile(r"layers\.(\d+)\.keys")


def to_safetensors(
    memory: KVMemory,
    file: str | os.PathLike[str],
    *,
    source: bool = False,
    licence: str = "",
    overwrite: bool = False,
) -> Exported:
    """Returns what it wrote: a memory in one safetensors file, bit by bit.

    Args:
        memory: the memory; bias, rules and positions go along.
        file: the file to make.
        source: whether tokens and text go along. Without them spans can't be found and a chat
            can't go on as one; keys and values hold the text in any case.
        licence: of the text.
        overwrite: whether a file that is there already is replaced.

    Raises:
        InvalidArgument: if the file exists.
        MutatedMemory: if the memory's tensors were changed in place.
    """
    kept = memory if source else without_source(memory)
    facts = document(kept, licence)
    with new_file(file, overwrite) as path:
        write_tensors(path, tensors(kept), facts)
    return Exported(Path(file), "safetensors", memory.slots, 0, (PRIVACY,))


def from_safetensors(
    file: str | os.PathLike[str],
    model: PreTrainedModel | ModelSpec | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    source: Source | None = None,
    strict: bool = True,
) -> KVMemory:
    """Returns the memory of a safetensors file.

    A file of ours is that memory again, with its lineage. A file of others needs the model, and
    tensors ``layers.{i}.keys`` and ``layers.{i}.values`` ``[head, slot, dim]``: positions are
    then 0 to p - 1, and the first query stands at p.

    Args:
        file: the file.
        model: the model, or its facts; may be None for a file of ours, which names it.
        tokenizer: its tokenizer, for the fingerprint.
        dtype: of keys and values; None takes the model's, or the file's without one.
        source: the text that it stands for, for a file that does not hold it.
        strict: whether the file must be of this very model; shapes always must fit.

    Raises:
        InvalidArgument: if it holds something else, or a model is needed.
        ShapeMismatch: if it does not fit the model.
        IncompatibleModel: if it names another model.
        CorruptMemory: if it can't be read, or was changed.
    """
    path = Path(file)
    read = read_tensors(path)
    if read.facts:
        memory = to_memory(read.facts, read.tensors, str(path))
        node_facts = {"licence": str(read.facts.get("licence", ""))}
        files = {"safetensors": read.digest}
        return admitted(
            memory, model, tokenizer, dtype, source, strict, "safetensors", files, node_facts
        )
    if model is None:
        raise InvalidArgument(f"{path} does not say which model it is for: pass the model")
    prefix = _bare(read, path)
    node = import_node("safetensors", {"safetensors": read.digest})
    return memory_of(prefix, spec_of(model, tokenizer), node, use_dtype(model, dtype), source)


def admitted(
    memory: KVMemory,
    model: PreTrainedModel | ModelSpec | None,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | str | None,
    source: Source | None,
    strict: bool,
    form: str,
    files: Mapping[str, str],
    facts: Mapping[str, Any],
) -> KVMemory:
    """Returns a memory that was read whole, let in by the live model, with its import noted."""
    wanted = use_dtype(model, dtype)
    made = memory if wanted in (None, memory.dtype) else memory.to(dtype=wanted)
    if model is not None:
        from kvedit.runtime.gate import admit

        admit(made, spec_of(model, tokenizer), made.dtype, strict)
    head = memory.lineage.head
    node = import_node(form, files, facts, (head.id,) if head else ())
    fields: dict[str, Any] = {"lineage": Lineage.join([memory.lineage], node)}
    if source is not None and made.source is None:
        fields["source"] = source
    return dataclasses.replace(made, **fields)


def _bare(read: TensorFile, path: Path) -> Prefix:
    indices = sorted(int(match[1]) for name in read.tensors if (match := _KEYS.fullmatch(name)))
    wanted = {f"layers.{i}.{kind}" for i in indices for kind in ("keys", "values")}
    if not indices or indices != list(range(len(indices))) or wanted != set(read.tensors):
        odd = sorted(wanted ^ set(read.tensors))[:3]
        raise InvalidArgument(
            f"{path}: expected tensors layers.0.keys, layers.0.values and so on for every layer "
            f"and nothing else; these are missing or too many: {odd or 'all'}"
        )
    keys, values = (
        tuple(read.tensors[f"layers.{index}.{kind}"] for index in indices)
        for kind in ("keys", "values")
    )
    if keys[0].ndim != 3:
        raise InvalidArgument(
            f"{path}: expected keys [head, slot, dim], found shape {list(keys[0].shape)}"
        )
    return Prefix(keys, values)
