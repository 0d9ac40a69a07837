"""Spans: found by text, regex, role, sentence, tokens, slots; resolved per layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvedit.errors import AmbiguousSpan, InvalidArgument, SpanNotFound
from kvedit.memory import LayerKV, Message, Source, Span, SpanQuery
from kvedit.testing import tiny_model


def spelled(memory: Any, span: Span) -> list[str]:
    """The characters of each range's tokens."""
    offsets = memory.source.offsets
    return [
        memory.source.text[int(offsets[start:stop, 0].min()) : int(offsets[start:stop, 1].max())]
        for start, stop in span.ranges
    ]


@pytest.mark.parametrize(
    ("query", "texts"),
    [
        ({"text": "refund"}, ["refund"]),
        ({"text": "red. The"}, ["red.  The"]),
        ({"text": "refund window is   60"}, ["refund window\nis 60"]),
        ({"text": " box\tis "}, ["box is"]),
        ({"text": "  "}, ["  "]),
        ({"text": "The", "occurrence": 2}, ["The"]),
        ({"text": "box", "occurrence": "all"}, ["box", "box"]),
        ({"text": "60 days!"}, ["60 days!"]),
        ({"regex": r"\d+ \w+"}, ["60 days"]),
        ({"regex": r"(?i)the box"}, ["The box"]),
        ({"regex": "box(?= blue)"}, ["box"]),
        ({"regex": "x*", "occurrence": 1}, ["x"]),
        ({"sentence": "refund"}, ["The refund window"]),
        ({"sentence": "60"}, ["is 60 days!"]),
        ({"sentence": "blue"}, ["Is the box blue?"]),
        ({"sentence": "red"}, ["The box is red."]),
        ({"sentence": "box", "occurrence": "all"}, ["The box is red.", "Is the box blue?"]),
    ],
    ids=str,
)
def test_what_is_found(query: dict[str, Any], texts: list[str], toy: Any, make: Any) -> None:
    if "(?i)" in str(query):
        query = {**query, "occurrence": 1}
    memory = toy(source=make.source(width=1))  # one token per character: ranges are exact
    span = memory.find(**query)
    assert spelled(memory, span) == texts
    assert span.text == " … ".join(texts)
    assert len(span) == sum(map(len, texts))
    assert memory.resolve(query) == span == memory.resolve(SpanQuery(**query))


def test_a_string_is_its_text(toy: Any) -> None:
    memory = toy()
    assert memory.resolve("refund") == memory.find("refund") == memory.find(text="refund")


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (
            {"text": "refunds"},
            SpanNotFound,
            "text='refunds' in a memory of 22 tokens that begins 'The",
        ),
        ({"text": "the Box"}, SpanNotFound, "nothing matches"),
        ({"regex": "z*"}, SpanNotFound, r"nothing matches regex='z\*'"),
        (
            {"text": "box", "occurrence": 3},
            SpanNotFound,
            "text='box', occurrence=3: only 2 matches",
        ),
        ({"text": "box"}, AmbiguousSpan, "2 times; choose with occurrence=1 to 2, or 'all'"),
        ({"sentence": "he"}, AmbiguousSpan, "3 times"),
        ({"role": "user"}, SpanNotFound, "no message of role 'user'; this memory has none"),
        ({"tokens": (3, 23)}, SpanNotFound, "tokens 3 to 23 of a memory of 22 tokens"),
        ({"tokens": (22, 22)}, SpanNotFound, "tokens 22 to 22"),
        ({"tokens": (-23, 4)}, SpanNotFound, "tokens -23 to 4 of a memory of 22 tokens"),
        ({"slots": (-1, -3)}, SpanNotFound, "slots -1 to -3 of a memory of 22 slots"),
    ],
    ids=str,
)
def test_what_is_not_found(query: Any, error: type[Exception], message: str, toy: Any) -> None:
    with pytest.raises(error, match=message):
        toy().find(**query)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "one of text, regex, sentence, tokens, slots, or by role; given: None"),
        ({"text": "a", "sentence": "b"}, r"given: \['text', 'sentence'\]"),
        ({"tokens": (0, 1), "slots": (0, 1)}, r"given: \['tokens', 'slots'\]"),
        ({"regex": ""}, "regex: expected a text that is not empty, found ''"),
        ({"text": 60}, "text: expected a text that is not empty, found 60"),
        ({"text": "a", "role": ""}, "role: expected a text"),
        ({"regex": "(a"}, r"regex '\(a' is not valid"),
        ({"tokens": 3}, "tokens: expected a pair of whole numbers, found 3"),
        ({"tokens": (0, 3, 2)}, "tokens: expected a pair"),
        ({"slots": (0.0, 3.0)}, "slots: expected a pair"),
        ({"slots": (False, True)}, "slots: expected a pair"),
        ({"tokens": (0, 3), "role": "user"}, "role and occurrence don't go with it.*role='user'"),
        ({"slots": (0, 3), "occurrence": 1}, "role and occurrence don't go with it"),
        ({"text": "a", "occurrence": 0}, "occurrence: expected a number from 1, or 'all'; found 0"),
        ({"text": "a", "occurrence": "first"}, "occurrence: .* found 'first'"),
        ({"text": "a", "occurrence": True}, "occurrence: .* found True"),
    ],
    ids=str,
)
def test_what_is_no_query(query: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        SpanQuery(**query)


@pytest.mark.parametrize(
    ("ranges", "unit", "message"),
    [
        ((), "token", r"at least one; found \[\]"),
        (((2, 2),), "token", r"start < stop, at least one; found \[\(2, 2\)\]"),
        (((-1, 2),), "token", "0 <= start < stop"),
        (((0, 2), (3, 1)), "slot", "start < stop"),
        (((0,),), "token", "ranges: expected a pair"),
        (((0, 2),), "word", "'token' or 'slot', found 'word'"),
    ],
)
def test_what_is_no_span(ranges: Any, unit: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Span(ranges, unit)


def test_ranges_count_from_both_ends(toy: Any) -> None:
    memory = toy()
    assert memory.find(tokens=(-3, -1)).ranges == ((19, 21),)
    assert memory.find(tokens=(2, -2)).ranges == ((2, 20),)
    assert memory.find(tokens=(-22, 22)).ranges == ((0, 22),)
    assert memory.find(tokens=[4, 6]) == memory.find(tokens=(4, 6))
    assert memory.find(slots=(-3, -1)) == Span(((19, 21),), "slot")
    assert hash(SpanQuery(tokens=[4, 6])) == hash(SpanQuery(tokens=(4, 6)))  # type: ignore[arg-type]


CHAT = (
    Message("system", "Be brief.", 4, 13),
    Message("user", "The refund?", 18, 29),
    Message("assistant", "60 days.", 34, 42),
    Message("user", "The box?", 47, 55),
    Message("tool", "lost"),
)
RENDERED = "sys|Be brief.|usr|The refund?|asn|60 days.|usr|The box?|"


@pytest.mark.parametrize(
    ("query", "texts"),
    [
        ({"role": "system"}, ["Be brief."]),
        ({"role": "assistant"}, ["60 days."]),
        ({"role": "user", "occurrence": 2}, ["The box?"]),
        ({"role": "user", "occurrence": "all"}, ["The refund?", "The box?"]),
        ({"role": "user", "text": "The refund"}, ["The refund"]),
        ({"role": "user", "text": "The", "occurrence": 2}, ["The"]),
        ({"role": "user", "regex": r"\?", "occurrence": 1}, ["?"]),
        ({"role": "assistant", "sentence": "60"}, ["60 days."]),
    ],
    ids=str,
)
def test_roles(query: dict[str, Any], texts: list[str], toy: Any, make: Any) -> None:
    memory = toy(source=make.source(RENDERED, 1, CHAT))
    assert spelled(memory, memory.find(**query)) == texts


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ({"role": "user"}, AmbiguousSpan, "role='user' matches 2 times"),
        ({"role": "bot"}, SpanNotFound, r"'bot'; this memory has \['assistant', 'system', 'tool'"),
        ({"role": "tool"}, SpanNotFound, "nothing matches role='tool'"),
        (
            {"role": "system", "text": "60"},
            SpanNotFound,
            "nothing matches text='60', role='system'",
        ),
    ],
    ids=str,
)
def test_roles_that_do_not_fit(
    query: dict[str, Any], error: type[Exception], message: str, toy: Any, make: Any
) -> None:
    with pytest.raises(error, match=message):
        toy(source=make.source(RENDERED, 1, CHAT)).find(**query)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("naïve café — 你好, done", "café — 你好"),
        ("a 🙂🙃 face", "🙃"),
        ("family 👨\u200d👩\u200d👧 here", "👨\u200d👩\u200d👧"),
        ("combining e\u0301 mark", "e\u0301"),
        ("مرحبا بالعالم", "بالعالم"),
        ("a\u00a0b c", "a b"),  # a no-break space is white space too
    ],
)
def test_unicode_in_a_byte_level_vocabulary(text: str, wanted: str, toy: Any) -> None:
    """Several tokens may share one character; all of them are in the span."""
    tokenizer = tiny_model("llama")[1]
    coded = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = torch.tensor(coded.input_ids), torch.tensor(coded.offset_mapping)
    memory = toy(source=Source(ids, text, offsets))
    span = memory.find(wanted)
    ((start, stop),) = span.ranges
    assert span.text.replace("\u00a0", " ") == wanted
    decoded = tokenizer.decode(ids[start:stop]).replace("\u00a0", " ")
    assert decoded.strip() == wanted
    assert start > 0  # BOS has no characters


def test_a_token_without_characters_is_in_no_text(toy: Any) -> None:
    memory = toy()
    assert memory.find("The", occurrence=1).ranges == ((1, 2),)
    assert memory.find(tokens=(0, 1)).ranges == ((0, 1),)


def test_a_text_between_two_tokens_takes_both(toy: Any, make: Any) -> None:
    memory = toy(source=make.source("abcdef", 3))
    assert memory.find("cd").ranges == ((1, 3),)
    assert memory.find("abc").ranges == ((1, 2),)


def test_matches_in_one_token_count_once(toy: Any, make: Any) -> None:
    memory = toy(source=make.source("aaaaaabbb", 3))
    span = memory.find("a", occurrence="all")
    assert span.ranges == ((1, 3),)
    assert len(span) == 2


def test_unions(toy: Any) -> None:
    memory = toy()
    left, right = memory.find(tokens=(2, 6)), memory.find(tokens=(9, 12))
    assert (left | right).ranges == ((2, 6), (9, 12)) == (right | left).ranges
    assert (left | memory.find(tokens=(4, 9)) | right).ranges == ((2, 12),)
    assert (left | left) == left
    assert (memory.find("refund") | memory.find("60")).text == "refund … 60"
    with pytest.raises(InvalidArgument, match="span of tokens with one of slots"):
        left | memory.find(slots=(0, 2))


def test_layers_resolve_by_source(toy: Any) -> None:
    memory = toy()
    assert [layer.slots for layer in memory.layers.values()] == [22, 5, 22]
    masks = [memory.find(tokens=(15, 19)).mask(layer) for layer in memory.layers.values()]
    assert [int(mask.sum()) for mask in masks] == [4, 2, 4]
    assert masks[1].tolist() == [True, True, False, False, False]
    by_slot = [memory.find(slots=(1, 7)).mask(layer) for layer in memory.layers.values()]
    assert [int(mask.sum()) for mask in by_slot] == [6, 4, 6]
    early = memory.find(tokens=(0, 3)).mask(memory.layers[1])
    assert early.dtype == torch.bool
    assert not bool(early.any())


def test_duplicated_and_reordered_slots_are_found_by_token(toy: Any) -> None:
    layer = toy().layers[0].select(torch.tensor([5, 3, 3, 9]))
    assert Span(((3, 4), (9, 10))).mask(layer).tolist() == [False, True, True, True]
    assert Span(((0, 2),), "slot").mask(layer).tolist() == [True, True, False, False]


def test_slots_that_no_token_made(toy: Any) -> None:
    memory = toy(bias=False, ragged=False)
    layers = {
        index: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
        for index, layer in memory.layers.items()
    }
    bare = dataclasses.replace(memory, layers=layers, source=None)
    for query in ({"text": "box"}, {"tokens": (0, 2)}, {"role": "user"}):
        with pytest.raises(SpanNotFound, match=r"no tokens; select its slots with slots=\(a, b\)"):
            bare.find(**query)
    assert int(bare.find(slots=(2, 5)).mask(bare.layers[0]).sum()) == 3
    with pytest.raises(SpanNotFound, match="this memory has 0 tokens"):
        bare.resolve(memory.find("refund"))


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Source, int, int]:
    """Tokens that tile a text: some without characters, some that share one character."""
    widths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=12))
    at, offsets = 0, []
    for width in widths:
        copies = draw(st.integers(1, 3)) if width == 1 else 1
        offsets += [(at, at + width)] * copies
        at += width
    start = draw(st.integers(0, at))
    stop = draw(st.integers(start, at))
    tokens = torch.arange(len(offsets))
    return Source(tokens, "x" * at, torch.tensor(offsets).reshape(-1, 2)), start, stop


@given(tilings())
def test_token_range_is_exactly_what_overlaps(case: tuple[Source, int, int]) -> None:
    source, start, stop = case
    wanted = set(range(start, stop))
    first, last = source.token_range(start, stop)
    spans = [set(range(int(a), int(b))) for a, b in source.offsets]
    touching = [index for index, span in enumerate(spans) if span & wanted]
    if not wanted:
        return  # a caller never asks for an empty range
    assert [i for i in range(first, last) if spans[i]] == touching
    if touching:
        assert (first, last) == (touching[0], touching[-1] + 1)


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 6)).map(lambda p: (p[0], p[0] + p[1])),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_ranges_have_one_form(pairs: list[tuple[int, int]], random: Any) -> None:
    members = {i for start, stop in pairs for i in range(start, stop)}
    span = Span(tuple(pairs))
    assert {i for start, stop in span.ranges for i in range(start, stop)} == members
    assert len(span) == len(members)
    assert all(a[1] < b[0] for a, b in zip(span.ranges, span.ranges[1:], strict=False))
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert Span(tuple(shuffled)) == span
    union = Span((shuffled[0],))
    for pair in shuffled[1:]:
        union = union | Span((pair,))
    assert union == span


@given(st.lists(st.integers(-1, 11), max_size=12), st.integers(0, 11), st.integers(1, 5))
def test_a_mask_is_membership(source: list[int], start: int, size: int) -> None:
    slots = len(source)
    layer = LayerKV(
        torch.zeros(1, slots, 2),
        torch.zeros(1, slots, 2),
        torch.zeros(slots, dtype=torch.int64),
        torch.tensor(source, dtype=torch.int64),
    )
    mask = Span(((start, start + size),)).mask(layer)
    assert mask.tolist() == [start <= token < start + size for token in source]
