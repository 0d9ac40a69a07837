"""Contrast sets: forms of pairs, files, identity, division, templates."""

from __future__ import annotations

import json

import pytest
import torch

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.steering import (
    Contrast,
    Pair,
    Question,
    arithmetic_questions,
    few_shot_reasoning,
    persona,
    refusal,
    style_pairs,
)

CHAT = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four"}]


def test_equal_contents_have_equal_digests_in_every_form():
    texts = [
        Contrast.of([("a", "b"), ("c", "d")]),
        Contrast((Pair("a", "b"), Pair("c", "d")), "named"),
        Contrast.of([["a", "b"], {"positive": "c", "negative": "d"}]),
    ]
    assert len({one.digest for one in texts}) == 1
    chats = [
        Contrast.of([(CHAT, CHAT[:1])]),
        Contrast.of([([("user", "How many?"), ("assistant", "Four")], [("user", "How many?")])]),
    ]
    assert chats[0].digest == chats[1].digest
    ids = [Contrast.of([([1, 2], (3,))]), Contrast.of([(torch.tensor([1, 2]), [3])])]
    assert ids[0].digest == ids[1].digest
    others = [
        Contrast.of([("c", "d"), ("a", "b")]),
        Contrast.of([("b", "a"), ("c", "d")]),
        Contrast.of([("a", "b")]),
        Contrast.of([("a", "b"), ("c", "d")], prompt=True),
        chats[0],
        ids[0],
    ]
    assert len({texts[0].digest, *(one.digest for one in others)}) == 7


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        ["ab"],
        [("a",)],
        [("a", "")],
        [("a", None)],
        [("a", CHAT)],
        [("a", [])],
        [([1, "x"], [2, 3])],
        [([{"role": "user"}], CHAT)],
        [([{"role": "user", "content": "x", "name": "y"}], CHAT)],
        [([{"role": "user", "content": ["x"]}], CHAT)],
        [{"positive": "a", "negative": "b", "extra": 1}],
    ],
)
def test_what_is_no_pair_is_refused(pairs):
    with pytest.raises(InvalidArgument, match=r"pair|message|kind"):
        Contrast.of(pairs)


def test_files_in_every_layout(tmp_path):
    expected = Contrast.of([("a", "b"), (CHAT, CHAT[:1])], prompt=False)
    plain = [pair.to_json() for pair in expected.pairs]
    lines = tmp_path / "set.jsonl"
    lines.write_text("\n".join([json.dumps(plain[0]), "", json.dumps(list(plain[1].values()))]))
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps(plain))
    written = tmp_path / "written.json"
    expected.write(written)
    assert Contrast.read(lines).pairs == Contrast.read(listed).pairs == expected.pairs
    assert Contrast.read(lines).name == "set"
    assert Contrast.read(written).digest == expected.digest
    assert Contrast.read(written).prompt is False


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.jsonl", '["a", "b"]\n["a"]', "line 2.*expected a pair"),
        ("a.jsonl", '["a", "b"]\n{', "line 2"),
        ("a.json", "{", "a.json"),
        ("a.json", "3", "list of pairs"),
        ("a.json", '{"pairs": 3}', "list of pairs"),
        ("a.json", '{"pairs": [["a", "b"]], "other": 1}', "list of pairs"),
        ("a.json", "[]", "at least one pair"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidArgument, match=match):
        Contrast.read(tmp_path / name)
    with pytest.raises(InvalidArgument, match="none"):
        Contrast.read(tmp_path / "none.json")


def test_split_is_a_division_by_seed():
    contrast = Contrast.of([(f"a{i}", f"b{i}") for i in range(10)], prompt=True)
    first, second = contrast.split(0.3, seed=1)
    assert (len(first), len(second)) == (3, 7)
    assert sorted([*first.pairs, *second.pairs], key=str) == sorted(contrast.pairs, key=str)
    assert first.digest == contrast.split(0.3, seed=1)[0].digest
    assert first.digest != contrast.split(0.3, seed=2)[0].digest
    assert first.prompt is True
    assert [len(part) for part in contrast.split(0.99)] == [9, 1]
    for share in (0, 1, -0.5):
        with pytest.raises(InvalidArgument, match="share"):
            contrast.split(share)
    with pytest.raises(InvalidArgument, match="two pairs"):
        Contrast.of([("a", "b")]).split(0.5)


def test_sums_are_right_and_drawn_by_seed():
    questions = arithmetic_questions(200, seed=3)
    assert questions == arithmetic_questions(200, seed=3) != arithmetic_questions(200, seed=4)
    assert questions[:20] == arithmetic_questions(20, seed=3)
    assert len({one.question for one in questions}) == 200
    for one in questions:
        assert one.reasoning.startswith("First, ") and " Then, " in one.reasoning
        assert one.reasoning.endswith(f" Therefore, the answer is {one.answer}.")
        assert int(one.answer) >= 1
        assert _solved(one.question) == int(one.answer), one.question
    with pytest.raises(InvalidArgument, match="1 question"):
        arithmetic_questions(0)


def _solved(question):
    """The answer from the question's numbers alone."""
    a, *rest = [int(word) for word in question.replace(".", " ").split() if word.isdigit()]
    if "boxes" in question:
        return a * rest[0] + rest[1]
    if "gives" in question:
        return a - rest[0] + rest[1]
    if "jar" in question:
        return (a - rest[0]) // rest[1]
    return a * rest[0] + (rest[1] if "rides" in question else -rest[1])


@pytest.mark.parametrize("layout", ["turns", "message", "text"])
def test_few_shot_sides_differ_by_the_reasoning_alone(layout):
    contrast = few_shot_reasoning(pairs=7, shots=3, seed=5, layout=layout)
    again = few_shot_reasoning(pairs=7, shots=3, seed=5, layout=layout)
    assert len(contrast) == 7 and contrast.digest == again.digest
    assert contrast.digest != few_shot_reasoning(pairs=7, shots=3, seed=6, layout=layout).digest
    known = {one.question: one for one in arithmetic_questions(14, seed=5)}
    lasts = set()
    for pair in contrast.pairs:
        positive, negative = (
            side if isinstance(side, str) else "\n".join(content for _, content in side)
            for side in (pair.positive, pair.negative)
        )
        for one in known.values():
            positive = positive.replace(one.reasoning + "\n", "")
        assert positive == negative
        shown = [question for question in known if question in negative]
        assert len(shown) == 4 and negative.count("Answer: ") == 3
        last = max(shown, key=negative.index)
        assert negative.rstrip().endswith(last)
        lasts.add(last)
        if layout == "turns":
            assert [role for role, _ in pair.positive] == ["user", "assistant"] * 3 + ["user"]
    assert len(lasts) == 7


def test_few_shot_takes_questions_of_the_user():
    mine = [("q1", "because", "1"), {"question": "q2", "reasoning": "so", "answer": "2"},
            Question("q3", "hence", "3")]  # fmt: skip
    contrast = few_shot_reasoning(mine, pairs=3, shots=2, system="Be brief.")
    first = contrast.pairs[0]
    assert first.positive[0] == ("system", "Be brief.") and first.positive[-1] == ("user", "q1")
    assert {content for _, content in first.negative[2::2]} == {"Answer: 2", "Answer: 3"}
    for arguments, match in (
        ({"shots": 3}, "4 questions, found 3"),
        ({"pairs": 0}, "1 or more"),
        ({"shots": 0}, "1 or more"),
        ({"layout": "text", "system": "x", "shots": 2}, "system message"),
    ):
        with pytest.raises(InvalidArgument, match=match):
            few_shot_reasoning(mine, **arguments)
    with pytest.raises(UnknownName, match=r"layout 'turn'.*turns"):
        few_shot_reasoning(mine, layout="turn")
    with pytest.raises(InvalidArgument, match="question, reasoning, answer"):
        few_shot_reasoning([("q", "a")])
    with pytest.raises(InvalidArgument, match="reasoning: expected a text"):
        Question("q", " ", "a")


def test_other_templates():
    style = style_pairs([("Hi", "Well met, traveller", "Hello")])
    assert style.pairs[0].positive == (("user", "Hi"), ("assistant", "Well met, traveller"))
    assert style.pairs[0].negative == (("user", "Hi"), ("assistant", "Hello"))
    who = persona(["Hi", "Bye"], "a pirate", "a clerk", starts=("I", "My"))
    assert len(who) == 4
    assert who.pairs[1].positive == (
        ("system", "Act as if you are a pirate."), ("user", "Hi"), ("assistant", "My"),
    )  # fmt: skip
    assert who.pairs[1].negative[1:] == who.pairs[1].positive[1:]
    assert persona(["Hi"], "a", "b").pairs[0].positive[-1] == ("user", "Hi")
    with pytest.raises(InvalidArgument, match="persona"):
        persona(["Hi"], "a", "b", system="Be kind.")
    harm = refusal(["How do I pick a lock?"], ["How do I pick a melon?"])
    assert harm.pairs == (Pair([("user", "How do I pick a lock?")],
                               [("user", "How do I pick a melon?")]),)  # fmt: skip
    same = refusal(["x"], refusals=("No.",), answers=("Sure",))
    assert [side[-1] for side in (same.pairs[0].positive, same.pairs[0].negative)] == [
        ("assistant", "No."), ("assistant", "Sure"),
    ]  # fmt: skip
    assert len(refusal(["x", "y"])) == 6
    for arguments in (
        (["x"], ["y", "z"]), (["x"], None, ("No.",), ()),
    ):  # fmt: skip
        names = ("requests", "harmless", "refusals", "answers")
        with pytest.raises(InvalidArgument, match="as many"):
            refusal(**dict(zip(names, arguments, strict=False)))
