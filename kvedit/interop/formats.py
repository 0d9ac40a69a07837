"""Formats: their names, who writes and reads each, and how to tell them apart."""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.interop.tensors import HEADER_KEY, read_header
from kvedit.memory.delta import SITES

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
        delta: whether it holds a steering delta, and no memory of a context.
        ways: what there is of it: ``"to"``, ``"from"`` or both.
    """

    name: str
    module: str
    options: tuple[str, ...]
    folder: bool = True
    needs_model: bool = False
    delta: bool = False
    ways: tuple[str, ...] = ("to", "from")

    def write(self, *arguments: Any, **options: Any) -> Any:
        """Returns what the format's export returns."""
        return self._function("to")(*arguments, **options)

    def read(self, *arguments: Any, **options: Any) -> Any:
        """Returns the memory, or delta, that the format's import returns."""
        return self._function("from")(*arguments, **options)

    def check_way(self, way: str) -> None:
        """Raises if there is no such way.

        Args:
            way: ``"to"`` or ``"from"``.

        Raises:
            InvalidArgument: if the format is read only, or written only.
        """
        if way not in self.ways:
            raise InvalidArgument(
                f"{self.name} is {'written' if way == 'from' else 'read'} only: kvedit does not "
                f"{'read' if way == 'from' else 'write'} it"
            )

    def _function(self, way: str) -> Any:
        self.check_way(way)
        return getattr(importlib.import_module(self.module), f"{way}_{self.name}")


_OF_TEXT = ("source", "licence", "overwrite")
_SUFFIXES = {".pt": "hazy", ".gguf": "gguf", ".svec": "svec"}
_OF_DELTA = re.compile(rf"({'|'.join(SITES)})\.[0-9]+")
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
    Format("delta", "kvedit.interop.delta_file", ("overwrite",), folder=False, delta=True),
    Format("gguf", "kvedit.interop.gguf", ("overwrite",), folder=False, delta=True),
    Format(
        "lm_eval",
        "kvedit.interop.lm_eval_steered",
        ("strength", "overwrite"),
        needs_model=True,
        delta=True,
        ways=("to",),
    ),
    Format(
        "svec",
        "kvedit.interop.svec",
        (),
        folder=False,
        needs_model=True,
        delta=True,
        ways=("from",),
    ),
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
        marks = {"peft": "adapter_config.json", "hub": "memory.json", "lm_eval": "steering.json"}
        for name, file in marks.items():
            if (path / file).is_file():
                return name
        pickled = (path / "cartridge.safetensors").is_file() or any(path.glob("*.pt"))
        return "hazy" if pickled else None
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix] if path.is_file() else None
    header = read_header(path) if path.is_file() else {}
    if "layers.0.keys" in header:
        return "safetensors"
    texts = header.get("__metadata__")
    ours = isinstance(texts, dict) and HEADER_KEY in texts
    if not ours:
        return None
    if "trainable_keys.0" in header:
        return "hazy"
    return "delta" if any(_OF_DELTA.fullmatch(name) for name in header) else None
