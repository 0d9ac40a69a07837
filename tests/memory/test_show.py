"""How a memory shows itself: the facts, and nothing that a terminal or a page would obey."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvedit.memory import ChatState, LineageNode, Message
from kvedit.memory.show import human_bytes

HOSTILE = "<script>alert('x')</script>&\"\x1b[31mred\x07\u202egnp\r\nnew <b>"


def hostile(toy: Any, make: Any) -> Any:
    messages = (Message(HOSTILE, HOSTILE),)
    source = dataclasses.replace(make.source(HOSTILE, 2), messages=messages, chat=ChatState("d", 3))
    memory = toy(source=source)
    node = LineageNode("edit", HOSTILE, 1, "{}")
    return dataclasses.replace(
        memory,
        model=dataclasses.replace(memory.model, name=HOSTILE, family=HOSTILE),
        lineage=dataclasses.replace(memory.lineage, nodes=(node,)),
    )


def test_html_holds_no_markup_of_the_memory(toy: Any, make: Any) -> None:
    page = hostile(toy, make)._repr_html_()
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;&quot;" in page
    assert page.startswith("<table>")
    assert page.endswith("</table>")


@pytest.mark.parametrize("char", ["\x1b", "\x07", "\u202e", "\r"])
def test_text_holds_no_control_characters(char: str, toy: Any, make: Any) -> None:
    memory = hostile(toy, make)
    assert char in memory.source.text
    assert char not in repr(memory)
    assert char not in memory._repr_html_()


def test_one_line_per_fact(toy: Any, make: Any) -> None:
    labels = [line.split(":")[0].strip() for line in repr(hostile(toy, make)).splitlines()]
    assert labels == [
        "KVMemory",
        "model",
        "layers",
        "slots",
        "tokens",
        "next position",
        "size",
        "bias",
        "chat",
        "text",
        "made by",
    ]


def test_the_facts(toy: Any) -> None:
    memory = dataclasses.replace(toy(), verified=False)
    shown = repr(memory)
    for fact in (
        "model: toy (llama)",
        "layers: 3 of 3",
        "slots: 5 to 22",
        "tokens: 22",
        "bias: in 1 layers",
        "float32, cpu",
        "text: The box is red.  The refund window is 60 days! Is the box blue?",
        "warning: read without checking its bytes",
    ):
        assert fact in shown
    assert "warning" not in repr(toy())
    assert "bias" not in repr(toy(bias=False))
    assert "slots: 22\n" in repr(toy(ragged=False))


def test_long_texts_are_cut(toy: Any, make: Any) -> None:
    shown = repr(toy(source=make.source("word " * 100)))
    line = next(line for line in shown.splitlines() if "text:" in line)
    assert line.endswith("…")
    assert len(line) < 90


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5.0 TiB")],
)
def test_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text
