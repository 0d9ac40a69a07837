"""One clear error for each wrong parameter: its class, what was expected, what was found."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvedit.editors import Chain, Drop, Emphasize, Keep, Shift, Suppress, build
from kvedit.errors import AmbiguousSpan, InvalidArgument, SpanNotFound, UnknownName
from kvedit.memory import Span

EITHER = pytest.mark.parametrize("editor", [Emphasize, Suppress])
SPANNED = pytest.mark.parametrize(
    "editor", ["emphasize", "suppress", "drop", "keep"], ids=lambda name: name
)


def spanned(editor: str, span: Any, **parameters: Any) -> Any:
    if editor in ("emphasize", "suppress"):
        parameters["strength"] = 1.0
    return build(editor, span=span, **parameters)


@EITHER
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "one of strength .* alpha .*found strength=None, alpha=None"),
        ({"strength": 1.0, "alpha": 0.5}, "one of strength .*found strength=1.0, alpha=0.5"),
        ({"strength": math.nan}, "0 or above.*found nan"),
        ({"strength": -0.1}, "0 or above.*found -0.1"),
        ({"strength": -math.inf}, "0 or above.*found -inf"),
        ({"strength": "much"}, "strength: expected a number, found 'much'"),
        ({"strength": [1.0]}, r"strength: expected a number, found \[1.0\]"),
        ({"strength": True}, "strength: expected a number, found True"),
        ({"alpha": 0}, r"alpha must lie in \(0, 1\], found 0"),
        ({"alpha": 1.01}, r"alpha must lie in \(0, 1\], found 1.01"),
        ({"alpha": -0.5}, r"alpha must lie in \(0, 1\], found -0.5"),
        ({"alpha": math.nan}, r"alpha must lie in \(0, 1\], found nan"),
        ({"alpha": "small"}, "alpha: expected a number, found 'small'"),
    ],
    ids=str,
)
def test_strength(editor: Any, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        editor("box", **parameters)


def test_only_suppression_may_be_infinite() -> None:
    with pytest.raises(InvalidArgument, match=r"finite and 0 or above.*found inf"):
        Emphasize("box", strength=math.inf)
    assert Suppress("box", strength="inf") == Suppress("box", strength=math.inf)


def test_reference() -> None:
    with pytest.raises(InvalidArgument, match="'all_others' or 'rest_of_memory', found 'all'"):
        Emphasize("box", strength=1.0, reference="all")  # type: ignore[arg-type]


@SPANNED
@pytest.mark.parametrize("name", ["layers", "heads", "kv_heads"])
@pytest.mark.parametrize(
    "value", [(), 3, "0", (0.5,), ("0",), (True, False), [None], {0: "a", "b": 1}]
)
def test_indices(editor: str, name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: expected a list of numbers.*found "):
        spanned(editor, "box", **{name: value})


@SPANNED
def test_heads_of_one_kind_only(editor: str) -> None:
    with pytest.raises(InvalidArgument, match=r"heads \(query heads\) or kv_heads, not both"):
        spanned(editor, "box", heads=(0,), kv_heads=(0,))


@SPANNED
@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"layers": (3,)}, UnknownName, "unknown layer '3'.*Known: 0, 1, 2"),
        ({"layers": (-4,)}, UnknownName, "unknown layer '-4'.*Known: 0, 1, 2"),
        ({"heads": (4,)}, InvalidArgument, "4 query heads, found query head 4"),
        ({"heads": (-5,)}, InvalidArgument, "4 query heads, found query head -5"),
        ({"kv_heads": (2,)}, InvalidArgument, "2 KV heads, found KV head 2"),
        ({"kv_heads": (-3,)}, InvalidArgument, "2 KV heads, found KV head -3"),
    ],
    ids=str,
)
def test_what_the_model_lacks(
    editor: str, parameters: dict[str, Any], error: Any, message: str, subject: Any
) -> None:
    with pytest.raises(error, match=message):
        spanned(editor, "box", **parameters)(subject("llama").memory)


@SPANNED
@pytest.mark.parametrize(
    ("span", "error", "message"),
    [
        ("refund policy", SpanNotFound, "nothing matches text='refund policy'.*begins 'The thing"),
        ("the", AmbiguousSpan, "matches 2 times; choose with occurrence=1 to 2, or 'all'"),
        ({"text": "box", "occurrence": 2}, SpanNotFound, "only 1 match"),
        ({"tokens": [0, 999]}, SpanNotFound, "tokens 0 to 999 of a memory of"),
        ({"tokens": [-999, 3]}, SpanNotFound, "tokens -999 to 3 of a memory of"),
        ({"tokens": [4, 4]}, SpanNotFound, "tokens 4 to 4 of a memory of"),
        ({"slots": [5, 2]}, SpanNotFound, "slots 5 to 2 of a memory of"),
        ({"role": "user"}, SpanNotFound, "no message of role 'user'; this memory has none"),
        (Span(((0, 999),)), SpanNotFound, "reaches token 998; this memory has"),
        (Span(((0, 999),), "slot"), SpanNotFound, "reaches slot 998; this memory has"),
    ],
    ids=str,
)
def test_spans_that_are_not_there(
    editor: str, span: Any, error: Any, message: str, subject: Any
) -> None:
    with pytest.raises(error, match=message):
        spanned(editor, span)(subject("llama").memory)


@SPANNED
@pytest.mark.parametrize(
    ("span", "message"),
    [
        ("", "text: expected a text that is not empty, found ''"),
        (None, "a text or a mapping of .*found None"),
        (5, "a text or a mapping of .*found 5"),
        (["box"], r"a text or a mapping of .*found \['box'\]"),
        ({"txt": "box"}, "a text or a mapping of .*'text'.*found {'txt': 'box'}"),
        ({}, "found by one of .*given: None"),
        ({"text": "box", "regex": "b.x"}, r"found by one of .*given: \['text', 'regex'\]"),
        ({"ranges": []}, r"at least one; found \[\]"),
        ({"ranges": [[0, 2]], "role": "user"}, "a mapping of .*'ranges'.*found"),
    ],
    ids=str,
)
def test_what_is_no_span(editor: str, span: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        spanned(editor, span)


@pytest.mark.parametrize(
    "editor", [Chain(), Drop("box"), Emphasize("box", alpha=0.5), Keep("box"), Shift(1)], ids=repr
)
def test_editors_take_one_memory(editor: Any, subject: Any) -> None:
    memory = subject("llama").memory
    for given, found in (
        ((), r"found \[\]"),
        ((memory, memory), r"found \['KVMemory', 'KVMemory'\]"),
        ((memory.layers[0],), r"found \['LayerKV'\]"),
        (("box",), r"found \['str'\]"),
    ):
        with pytest.raises(InvalidArgument, match=f"edits one KVMemory, {found}"):
            editor(*given)


def test_names_and_parameters_of_editors() -> None:
    with pytest.raises(UnknownName, match=r"unknown editor 'emphasise'\. Did you mean emphasize"):
        build("emphasise", span="box", strength=1.0)
    with pytest.raises(InvalidArgument, match=r"editor drop: .*'strength'"):
        build("drop", span="box", strength=1.0)
    with pytest.raises(InvalidArgument, match=r"editor keep: .*'span'"):
        build("keep")
