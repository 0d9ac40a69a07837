"""Mappings as configs hold them: their keys must be a dataclass's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvedit.errors import InvalidArgument, UnknownName

__all__ = ["known_keys"]


def known_keys(name: str, kind: type, given: Any) -> dict[str, Any]:
    """Returns a mapping as keyword arguments of a dataclass.

    Args:
        name: what the mapping is, for messages.
        kind: the dataclass.
        given: the mapping.

    Raises:
        InvalidArgument: if it is no mapping, or a key is no field; near names are in the message.
    """
    if not isinstance(given, Mapping):
        raise InvalidArgument(f"{name}: expected keys and values, found {given!r}")
    known = [field.name for field in dataclasses.fields(kind)]
    for key in given:
        if key not in known:
            raise InvalidArgument(str(UnknownName(f"key of {name}", str(key), known)))
    return dict(given)
