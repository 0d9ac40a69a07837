"""Checkpoints: a folder per step, tensors beside a JSON file, there as a whole or not at all.

A checkpoint is written into a folder of another name, flushed to the disk, and renamed. What a
killed process left half-written has that other name, and is removed by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvedit.errors import CorruptMemory, IncompatibleModel, InvalidArgument
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["Checkpoint", "check_same_run", "latest", "write"]

FORMAT = "kvedit.training.1"
"""Name and version of the format."""

_NAME, _UNFINISHED = "step-", ".unfinished-"
_DAMAGED = "is damaged: remove it, and training goes on from the one before it"
_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A run after a step.

    Args:
        step: steps made.
        identity: of the run, see :func:`~kvedit.cartridges.identity.run_identity`.
        tensors: parameters, Adam's moments, parameters of the best evaluation; by name.
        progress: evaluations so far, whether training ended.
    """

    step: int
    identity: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    progress: Mapping[str, Any] = field(default_factory=dict)


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint and removes all but the newest ``keep``; returns its folder."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    place = folder / f"{_NAME}{checkpoint.step:08d}"
    half = folder / f"{_UNFINISHED}{place.name}"
    half.mkdir()
    held = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
    data = save(held)
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "identity": checkpoint.identity,
        "progress": checkpoint.progress,
        "tensors": digest_bytes(data),
    }
    body = canonical_json(state)
    _flushed(half / _TENSORS, data)
    # The state names its own digest too: a changed digit must not pass for another run.
    _flushed(half / _STATE, canonical_json({**state, "state": digest_bytes(body)}))
    _sync(half)
    half.rename(place)
    _sync(folder)
    for old in _found(folder)[:-keep]:
        _remove(old)
    return place


def latest(folder: Path) -> Checkpoint | None:
    """Returns the newest checkpoint of a folder, or None.

    Raises:
        CorruptMemory: if its bytes are not those that were written.
        InvalidArgument: if another version wrote it.
    """
    places = _found(folder)
    if not places:
        return None
    from safetensors.torch import load

    place = places[-1]
    try:
        state = json.loads((place / _STATE).read_bytes())
        data = (place / _TENSORS).read_bytes()
        told = state.pop("state")
        intact = told == digest_bytes(canonical_json(state)) and state["tensors"] == digest_bytes(
            data
        )
        known = state["format"] == FORMAT
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptMemory(f"{place} {_DAMAGED} ({error})") from error
    if not intact:
        raise CorruptMemory(f"{place} {_DAMAGED} (its digest is another one)")
    if not known:
        raise InvalidArgument(f"{place}: expected format {FORMAT}, found {state['format']!r}")
    return Checkpoint(state["step"], state["identity"], load(data), state["progress"])


def check_same_run(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises unless a checkpoint belongs to the run that wants to go on from it.

    Raises:
        IncompatibleModel: if it was made with another model.
        InvalidArgument: if start, samples or plan are others.
    """
    if found["model"] != wanted["model"]:
        pairs = [
            f"{key}: checkpoint {found['model'].get(key, '')[:18]}, model {value[:18]}"
            for key, value in wanted["model"].items()
            if found["model"].get(key) != value
        ]
        raise IncompatibleModel(
            f"{folder} holds checkpoints of another model: {'; '.join(pairs)}. Choose another "
            "folder"
        )
    reasons = []
    for key in wanted:
        if key != "plan" and found.get(key) != wanted[key]:
            reasons.append(f"{key}: checkpoint {_short(found.get(key))}, now {_short(wanted[key])}")
    # As JSON has them, so that a tuple equals the list that was written.
    plans = [json.loads(canonical_json(one["plan"])) for one in (found, wanted)]
    for key in plans[1]:
        if plans[0].get(key) != plans[1][key]:
            reasons.append(f"plan.{key}: checkpoint {plans[0].get(key)}, now {plans[1][key]}")
    if reasons:
        raise InvalidArgument(
            f"{folder} holds checkpoints of another run: {'; '.join(reasons)}. Choose another "
            "folder, or give what the run was given"
        )


def _short(value: Any) -> str:
    return str(value)[:18]


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_NAME}*") if path.is_dir())


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(place: Path) -> None:
    # Renamed first: half a checkpoint must not look like one.
    gone = place.with_name(f"{_UNFINISHED}gone-{place.name}")
    place.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _flushed(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder can't be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
