"""Control vectors in GGUF, as repeng writes them and llama.cpp reads them. Residual stream only.

A file has one float32 tensor ``direction.N`` per layer and three texts. N is the number of a block
from 0, and the vector is added to what that block hands on: llama.cpp puts ``direction.N`` at row
N - 1 of its buffer, fills layer ``il`` from row ``il - 1``, and adds it at the end of block ``il``;
repeng adds it to the output of the N-th item of the model's list of layers, and reads it from
``hidden_states[N + 1]``. So N is our layer, with nothing to add. llama.cpp has no ``direction.0``
and refuses a file that does. docs/steering.md has where that was read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import CorruptMemory, InvalidArgument, MissingDependency
from kvedit.interop.directions import delta_of, delta_parts
from kvedit.interop.exported import Exported
from kvedit.interop.files import new_file
from kvedit.interop.live import check_made_for, import_node, spec_of
from kvedit.memory import Delta, KVMemory, Lineage, LineageNode, ModelSpec
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store.parsing import SHAPE_ERRORS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ARCHITECTURE", "from_gguf", "to_gguf"]

ARCHITECTURE = "controlvector"
"""What such a file names as its architecture."""

_HINT, _COUNT = f"{ARCHITECTURE}.model_hint", f"{ARCHITECTURE}.layer_count"
_OURS = "kvedit.delta"  # readers of others look up their own keys and skip this one
_FORMAT = "kvedit.control.1"
_NAME = re.compile(r"direction\.([0-9]{1,5})")


def to_gguf(
    delta: Delta | KVMemory, file: str | os.PathLike[str], *, overwrite: bool = False
) -> Exported:
    """Returns what it wrote: a delta of the residual stream as a control vector.

    Model, facts and lineage go along under a key of ours, which other readers skip.

    Args:
        delta: the delta, or the operand that a store gave.
        file: the file to make.
        overwrite: whether a file that is there already is replaced.

    Raises:
        InvalidArgument: if it has vectors that the format can't say, or the file exists.
        MissingDependency: without the ``gguf`` package.
    """
    whole, vectors = delta_parts(delta, "a control vector")
    residual = vectors["residual"]
    if 0 in residual:
        rest = [layer for layer in residual if layer]
        raise InvalidArgument(
            "llama.cpp adds nothing behind the first block, and refuses a file with a vector for "
            f"layer 0: export delta.only(layers={rest}), or without it the whole is lost there"
        )
    library = _library("writing a control vector")
    with new_file(file, overwrite) as path:
        writer = library.GGUFWriter(path, ARCHITECTURE)
        writer.add_string(_HINT, whole.model.family)
        writer.add_uint32(_COUNT, len(residual))
        writer.add_string(_OURS, canonical_json(_ours(whole)).decode())
        for layer, vector in residual.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Exported(Path(file), "gguf", 0, 0, ())


def from_gguf(
    file: str | os.PathLike[str],
    model: PreTrainedModel | ModelSpec | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    strict: bool = True,
) -> Delta:
    """Returns the delta of a control vector.

    A file of ours is that delta again, with facts and lineage. A file of others names no more
    than a model type: then the model must be given, and another type is only warned of.

    Args:
        file: the file.
        model: the model, or its facts; may be None for a file of ours, which names it.
        tokenizer: its tokenizer, for the fingerprint.
        strict: whether a file of ours must be of this very model; shapes always must fit.

    Raises:
        InvalidArgument: if it is no control vector, or a model is needed.
        ShapeMismatch: if it does not fit the model.
        IncompatibleModel: if a file of ours names another model, with both fingerprints.
        CorruptMemory: if it can't be read, or a file of ours was changed.
        MissingDependency: without the ``gguf`` package.
    """
    path = Path(file)
    texts, vectors, digest = _read(path)
    hint, where = str(texts.get(_HINT, "")), str(path)
    files, found = {"gguf": digest}, {"model_hint": hint}
    node = import_node("gguf", files, found)
    facts: Mapping[str, Any] = {"estimator": "unknown", "format": "gguf"}
    if _OURS not in texts:
        return delta_of(vectors, model, tokenizer, node=node, facts=facts, hint=hint, where=where)
    written = _written(str(texts[_OURS]), vectors, where)
    spec = written.model
    if model is not None:
        check_made_for(spec.to_json(), spec_of(model, tokenizer), strict, where)
        fits = delta_of(vectors, model, tokenizer, node=node, facts=facts, hint="", where=where)
        # What was written knows the tokenizer, which may not be at hand now.
        spec = spec if strict else fits.model
    head = written.lineage.head
    node = import_node("gguf", files, found, (head.id,) if head else ())
    return Delta(written.vectors, spec, written.facts, Lineage.join([written.lineage], node))


def _ours(delta: Delta) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "content": delta.digest,
        "model": delta.model.to_json(),
        "facts": dict(delta.facts),
        "lineage": [node.to_json() for node in delta.lineage.nodes],
    }


def _written(text: str, vectors: Mapping[int, torch.Tensor], where: str) -> Delta:
    """Returns the delta that a file of ours names, compared with its digest."""
    try:
        ours = json.loads(text)
        if ours["format"] != _FORMAT:
            raise ValueError(f"expected the format {_FORMAT}, found {str(ours['format'])[:40]!r}")
        lineage = Lineage(tuple(LineageNode.from_json(node) for node in ours["lineage"]))
        [node.id for node in lineage.nodes]  # finds nodes that are not made as nodes are
        delta = Delta(
            {"residual": dict(vectors)}, ModelSpec.from_json(ours["model"]), ours["facts"], lineage
        )
        digest, named = delta.digest, ours["content"]
    except (*SHAPE_ERRORS, RuntimeError) as error:  # ours are among them
        raise CorruptMemory(f"{where}: what kvedit wrote there can't be read: {error}") from error
    if digest != named:
        raise CorruptMemory(
            f"{where} was changed: it names the content {str(named)[:12]}, and holds {digest[:12]}"
        )
    return delta


def _read(path: Path) -> tuple[dict[str, str], dict[int, torch.Tensor], str]:
    """Returns texts by key, vectors by layer and the BLAKE3 of a file."""
    library = _library("reading a control vector")
    if not path.is_file():
        raise InvalidArgument(f"{path} is missing, or no file")
    data = path.read_bytes()
    try:
        reader = library.GGUFReader(path)
        texts = {
            name: str(field.contents())
            for name, field in reader.fields.items()
            if field.types and field.types[0] == library.GGUFValueType.STRING
        }
        tensors = [(one.name, one.tensor_type.name, one.data.copy()) for one in reader.tensors]
    except Exception as error:  # whatever a damaged file makes the reader say
        raise CorruptMemory(f"{path} is no GGUF file, or damaged: {error}") from error
    found = texts.get("general.architecture", "")
    if found != ARCHITECTURE:
        raise InvalidArgument(
            f"{path}: expected a control vector, found the architecture {found[:40]!r}"
        )
    return texts, dict(_direction(*one, str(path)) for one in tensors), digest_bytes(data)


def _direction(name: str, kind: str, data: Any, where: str) -> tuple[int, torch.Tensor]:
    match = _NAME.fullmatch(name)
    # llama.cpp refuses these as well.
    if match is None:
        raise CorruptMemory(f"{where}: expected tensors direction.N, found {name[:60]!r}")
    if kind not in ("F32", "F16") or data.ndim != 1:
        raise CorruptMemory(
            f"{where}, {name}: expected one row of F32, found {kind} of shape {list(data.shape)}"
        )
    return int(match[1]), torch.from_numpy(data).float()


def _library(purpose: str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependency("gguf", "gguf", purpose) from error
    return gguf
