"""A stranger's torch checkpoint, read through the weights-only loader with an allow-list.

torch's weights-only unpickler builds tensors and plain containers and calls nothing else. Modules
that hold parameters are let in by name; of what was built only the tensors are looked at, never a
method called.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvedit.errors import CorruptMemory, InvalidArgument

__all__ = ["read_checkpoint"]

_ALLOWED = (nn.ParameterList, nn.Parameter, OrderedDict, set)
_ZIP = b"PK\x03\x04"


def read_checkpoint(path: Path) -> dict[str, list[torch.Tensor]]:
    """Returns the lists of tensors of a checkpoint, by name; None counts as an empty list.

    Args:
        path: a file that ``torch.save`` wrote: a mapping of names to lists of tensors.

    Raises:
        InvalidArgument: if there is no such file.
        CorruptMemory: if it is none, is damaged, or holds anything else. Nothing of it was run.
    """
    if not path.is_file():
        raise InvalidArgument(f"{path} is missing, or no file")
    with path.open("rb") as file:
        if file.read(4) != _ZIP:
            raise CorruptMemory(f"{path} is no checkpoint of torch.save (or one from before 1.6)")
    try:
        with torch.serialization.safe_globals(list(_ALLOWED)):
            # Third-party checkpoints may be read this way, and no other.
            found = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # whatever a broken or hostile pickle makes torch say
        names = ", ".join(one.__name__ for one in _ALLOWED)
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CorruptMemory(
            f"{path} was refused: only tensors, plain containers and {names} are read from a "
            f"checkpoint, and nothing else is run. torch says: {said}"
        ) from error
    if not isinstance(found, Mapping):
        raise CorruptMemory(f"{path}: expected a mapping of names, found {type(found).__name__}")
    return {
        str(name): _tensors(value, f"{path}, {str(name)[:40]}") for name, value in found.items()
    }


def _tensors(value: Any, where: str) -> list[torch.Tensor]:
    if value is None:
        return []
    if isinstance(value, nn.ParameterList):
        value = _parameters(vars(value), where)
    if not isinstance(value, list | tuple):
        raise CorruptMemory(f"{where}: expected a list of tensors, found {type(value).__name__}")
    return [_tensor(item, where) for item in value]


def _parameters(state: dict[str, Any], where: str) -> list[Any]:
    """Returns the entries of a ParameterList in order, whatever its other attributes are."""
    held = state.get("_parameters")
    if not isinstance(held, dict) or set(held) != {str(index) for index in range(len(held))}:
        raise CorruptMemory(f"{where}: this ParameterList is damaged")
    return [held[str(index)] for index in range(len(held))]


def _tensor(item: Any, where: str) -> torch.Tensor:
    if not isinstance(item, torch.Tensor):
        raise CorruptMemory(f"{where}: expected tensors, found {type(item).__name__}")
    plain = item.detach()
    if plain.layout != torch.strided or plain.device.type != "cpu" or plain.is_quantized:
        raise CorruptMemory(f"{where}: expected plain tensors, found {plain.layout} {plain.dtype}")
    # A view can claim more elements than there are bytes, and would fill the RAM once copied.
    if plain.numel() * plain.element_size() > plain.untyped_storage().nbytes():
        raise CorruptMemory(f"{where}: a tensor of shape {list(plain.shape)} has fewer bytes")
    return plain
