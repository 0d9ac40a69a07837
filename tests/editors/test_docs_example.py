"""The editor that docs/editors.md shows how to write is a good one."""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kvedit.editors import Editor, Reader
from kvedit.editors.base import SpanLike
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, SpanQuery

PAGE = Path(__file__).resolve().parents[2] / "docs/editors.md"
NAMES = {
    "Editor": Editor,
    "InvalidArgument": InvalidArgument,
    "KVMemory": KVMemory,
    "Mapping": Mapping,
    "Reader": Reader,
    "SpanLike": SpanLike,
    "SpanQuery": SpanQuery,
    "dataclass": dataclasses.dataclass,
    "dataclasses": dataclasses,
    "math": math,
    "torch": torch,
}


def test_the_example_is_an_editor(subject: Any) -> None:
    (block,) = re.findall(r"```python\n( +@dataclass.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names = {**NAMES, "__name__": __name__}
    exec(compile(textwrap.dedent(block), str(PAGE), "exec"), names)
    scale = names["ScaleValues"]
    memory = subject("gemma3", window="windowed").memory
    edited = scale({"tokens": [-6, -2]}, 2.0)(memory)
    for index, layer in edited.layers.items():
        old = memory.layers[index]
        inside = memory.find(tokens=(-6, -2)).mask(old)
        assert torch.equal(layer.values[:, inside], 2 * old.values[:, inside])
        assert torch.equal(layer.values[:, ~inside], old.values[:, ~inside])
        assert layer.keys is old.keys
    assert edited.lineage.head.name == "scale_values"
    assert scale("box", 1.0)(memory).digest == memory.digest
    with pytest.raises(InvalidArgument, match="factor must be finite, found nan"):
        scale("box", math.nan)
