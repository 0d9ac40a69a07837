"""Formats: their names, who writes and reads each, and how to tell them apart."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvedit.errors import UnknownName
from kvedit.interop.tensors import HEADER_KEY, read_header

__all__ = ["FORMATS", "Format", "detect", "format_of"]


@dataclass(frozen=True)
class Format:
    """One outside format.

    Args:
        name: what users call it.
        module: where its functions are; imported when they are asked for.
        options: keyword arguments of its export, beyond memory and place.
        folder: whether it is a folder, and no file.
        needs_model: whether its files can't be read without the model.
    """

    name: str
    module: str
    options: tuple[str, ...]
    folder: bool = True
    needs_model: bool = False

    def write(self, *arguments: Any, **options: Any) -> Any:
        """Returns what the format's export returns."""
        return self._function("to")(*arguments, **options)

    def read(self, *arguments: Any, **options: Any) -> Any:
        """Returns the memory that the format's import returns."""
        return self._function("from")(*arguments, **options)

    def _function(self, way: str) -> Any:
        return getattr(importlib.import_module(self.module), f"{way}_{self.name}")


_OF_TEXT = ("source", "licence", "overwrite")
_ALL = (
    Format(
        "peft",
        "kvedit.interop.peft",
        ("kind", "frozen", "dtype", "base_model", "revision", "overwrite"),
        needs_model=True,
    ),
    Format(
        "hazy",
        "kvedit.interop.hazy",
        ("frozen", "dtype", "remainder", "overwrite"),
        needs_model=True,
    ),
    Format("hub", "kvedit.interop.hub", _OF_TEXT),
    Format("safetensors", "kvedit.interop.plain", _OF_TEXT, folder=False),
)

FORMATS = MappingProxyType({one.name: one for one in _ALL})
"""All formats by name."""


def format_of(name: str) -> Format:
    """Returns the format of that name.

    Raises:
        UnknownName: if there is none.
    """
    if name not in FORMATS:
        raise UnknownName("format", name, FORMATS)
    return FORMATS[name]


def detect(place: str | os.PathLike[str]) -> str | None:
    """Returns the name of the format that lies at a place, or None where it is none of them.

    Told by names of files and of tensors; nothing is checked. kvedit's own one-file format
    (``Store.export``) is none of these.
    """
    path = Path(place)
    if path.is_dir():
        marks = {"peft": "adapter_config.json", "hub": "memory.json"}
        for name, file in marks.items():
            if (path / file).is_file():
                return name
        pickled = (path / "cartridge.safetensors").is_file() or any(path.glob("*.pt"))
        return "hazy" if pickled else None
    if path.suffix == ".pt":
        return "hazy" if path.is_file() else None
    header = read_header(path) if path.is_file() else {}
    if "layers.0.keys" in header:
        return "safetensors"
    texts = header.get("__metadata__")
    ours = isinstance(texts, dict) and HEADER_KEY in texts
    return "hazy" if ours and "trainable_keys.0" in header else None
