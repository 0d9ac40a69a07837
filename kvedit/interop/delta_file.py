"""A delta in one safetensors file, ``Delta.save``: all sites, with model, facts and lineage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvedit.interop.exported import Exported
from kvedit.interop.files import new_file
from kvedit.interop.live import check_made_for, spec_of
from kvedit.memory import Delta, KVMemory, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["from_delta", "to_delta"]


def to_delta(
    delta: Delta | KVMemory, file: str | os.PathLike[str], *, overwrite: bool = False
) -> Exported:
    """Returns what it wrote: a delta with all that it has, bit by bit.

    Args:
        delta: the delta, or the operand that a store gave.
        file: the file to make.
        overwrite: whether a file that is there already is replaced.

    Raises:
        InvalidArgument: if it is no delta, or the file exists.
    """
    whole = Delta.of(delta)
    with new_file(file, overwrite) as path:
        whole.save(path)
    return Exported(Path(file), "delta", 0)


def from_delta(
    file: str | os.PathLike[str],
    model: PreTrainedModel | ModelSpec | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    strict: bool = True,
) -> Delta:
    """Returns the delta of a file; it stays of the model that it names.

    Args:
        file: the file.
        model: the model that it must be of, or its facts; None takes what the file names.
        tokenizer: its tokenizer, for the fingerprint.
        strict: whether another model is refused.

    Raises:
        InvalidArgument: if there is no such file, or it holds something else.
        IncompatibleModel: if it names another model, with both fingerprints.
        CorruptMemory: if it is damaged.
    """
    found = Delta.load(file)
    if model is not None:
        check_made_for(found.model.to_json(), spec_of(model, tokenizer), strict, os.fspath(file))
    return found
