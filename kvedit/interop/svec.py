"""``.svec`` files: steering vectors of IBM's activation-steering, and of AISteer360. Read only.

Both are JSON with ``model_type`` and ``directions``, layer to numbers. activation-steering has one
row per layer and ``explained_variances``. AISteer360 has rows ``[K, D]``, where K means something
else for each method; only K = 1 is one direction of the residual stream.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.interop.directions import delta_of, layer_number
from kvedit.interop.live import import_node
from kvedit.interop.pickles import refuse_pickle
from kvedit.memory import Delta, ModelSpec
from kvedit.memory.digest import digest_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["from_svec"]


def from_svec(
    file: str | os.PathLike[str],
    model: PreTrainedModel | ModelSpec | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Delta:
    """Returns the delta of a ``.svec`` file: what each named layer's block hands on.

    Both libraries read ``hidden_states[layer + 1]``, which is that. AISteer360 adds a direction
    there; activation-steering adds it one block earlier, to what the block takes.

    Args:
        file: the file.
        model: the model, or its facts; the file names no more than a model type, and another type
            is only warned of.
        tokenizer: its tokenizer, for the fingerprint.

    Raises:
        InvalidArgument: if there is no such file, or its directions are no vectors of the
            residual stream.
        ShapeMismatch: if it does not fit the model.
        CorruptMemory: if it can't be read.
    """
    path = Path(file)
    if not path.is_file():
        raise InvalidArgument(f"{path} is missing, or no file")
    data = path.read_bytes()
    refuse_pickle(data, str(path))
    try:
        found = json.loads(data)
        hint, directions = found["model_type"], found["directions"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptMemory(f"{path} is no .svec file, or damaged: {error}") from error
    if not isinstance(hint, str) or not isinstance(directions, dict):
        raise CorruptMemory(f"{path}: model_type is no text, or directions no mapping")
    aisteer = _is_aisteer(found)
    vectors = {
        layer_number(name, str(path)): _vector(rows, found, f"{path}, layer {name}")
        for name, rows in directions.items()
    }
    form = "aisteer360" if aisteer else "activation-steering"
    facts: dict[str, Any] = {"estimator": "unknown", "format": f"svec of {form}"}
    facts |= _variances(found, str(path))
    node = import_node("svec", {"svec": digest_bytes(data)}, {"model_hint": hint, "form": form})
    return delta_of(
        vectors, model, tokenizer, node=node, facts=facts, hint=hint, where=str(path)
    )  # fmt: skip


def _is_aisteer(found: Mapping[str, Any]) -> bool:
    """Returns whether AISteer360 wrote it: rows of rows, or a key that only it has."""
    nested = [
        bool(rows) and isinstance(rows, list) and isinstance(rows[0], list)
        for rows in found["directions"].values()
    ]
    return any(nested) or bool({"num_heads", "head_dim", "probe_accuracies", "meta"} & set(found))


def _vector(rows: Any, found: Mapping[str, Any], where: str) -> torch.Tensor:
    try:
        tensor = torch.tensor(rows, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CorruptMemory(f"{where}: expected numbers, found {str(rows)[:40]}") from error
    if found.get("num_heads") is not None or found.get("probe_accuracies") is not None:
        raise InvalidArgument(
            f"{where}: directions of single query heads (ITI), before the output projection; a "
            "delta has no such site"
        )
    if tensor.ndim == 2 and tensor.shape[0] != 1:
        raise InvalidArgument(
            f"{where}: {tensor.shape[0]} rows, which are positions (ActAdd) or a plane (Angular "
            "Steering); a delta has one vector per layer"
        )
    return tensor[0] if tensor.ndim == 2 else tensor


def _variances(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = found.get("explained_variances")
    if not isinstance(given, dict):
        return {}
    try:
        shares = {str(layer_number(name, where)): float(value) for name, value in given.items()}
    except (TypeError, ValueError) as error:
        raise CorruptMemory(f"{where}: explained_variances are no numbers: {error}") from error
    return {"explained_variances": shares}
