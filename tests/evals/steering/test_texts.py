"""What is read off texts: markers, answers, repetition; and what prompts say besides."""

from __future__ import annotations

from fractions import Fraction

import pytest

from kvedit.errors import InvalidArgument
from kvedit.evals.recall import RecallQuestion
from kvedit.evals.steering import (
    STEP_BY_STEP,
    Markers,
    distinct,
    extract_choice,
    extract_number,
    is_right,
    longest_repeat,
    with_examples,
    with_instruction,
)
from kvedit.evals.steering.answers import answered
from kvedit.evals.steering.arithmetic import with_options


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("First, we add 3 and 4. Then, we take 2 away. Therefore, 5 are left.", 3),
        ("We look at it:\n1. First add.\n2. Next subtract.\nFinally: 5", 3),
        ("**Step 1:** add. Step 2: subtract.", 1),
        ("Let us go step by step. Second, look.", 2),
        ("The first day was the second best, so he has then 5 left, and finally thus none.", 0),
        ("If it rains, then it is wet. Firstborn. Hence", 1),
        ("5", 0),
        ("", 0),
    ],
)
def test_step_markers_stand_where_sentences_begin(answer: str, count: int) -> None:
    assert STEP_BY_STEP.count(answer) == count
    assert STEP_BY_STEP.marked(answer) == (count >= 1)


def test_markers_are_plain_data_and_checked() -> None:
    two = Markers("two", (r"\bx\b", "y"), least=2, opening="x")
    assert not two.marked("x x x") and two.marked("X and Y")
    assert two == Markers("two", [r"\bx\b", "y"], 2, "x") and hash(two)
    assert two.digest != Markers("two", (r"\bx\b", "y"), 1, "x").digest
    assert Markers(**two.to_json()) == two
    for wrong in ((), ("(",), ("x*",)):
        with pytest.raises(InvalidArgument):
            Markers("wrong", wrong)
    with pytest.raises(InvalidArgument, match="least"):
        Markers("wrong", ("x",), least=2)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("16 - 3 - 4 = 9, and 9 * 2 = $18.\n#### 18", 18),
        ("The answer is 1,234.50 dollars, not 7.", Fraction("1234.5")),
        ("So the answer, in dollars, is $18 for 9 eggs.", 18),
        ("The answer is found by adding 3 and 4, which gives 7.", 7),
        ("First answer: 3. No, the answer: -4", -4),
        ("5-3 leaves 2", 2),
        ("They eat 3/4 of it", Fraction(3, 4)),
        ("It costs 50% more, that is 12.", 12),
        ("There is no number", None),
        ("7/0", None),
    ],
)
def test_the_number_that_an_answer_comes_to(answer: str, number: Fraction | int | None) -> None:
    assert extract_number(answer) == number


def test_numbers_and_words_are_graded() -> None:
    number = RecallQuestion("How many?", ("1200",))
    assert is_right(number, "First 3. The answer is 1,200.") == 1
    assert is_right(number, "1200 and then 4") == 0 and is_right(number, "none") == 0
    assert answered(number, "4 of them") and not answered(number, "none")
    third = RecallQuestion("How much?", ("0.333",))
    assert is_right(third, "It is 1/3.") == 1 and is_right(third, "0.34") == 0
    word = RecallQuestion("Which day?", ("Friday",))
    assert is_right(word, "It was a friday.") == 1 and is_right(word, "Fridays") == 0
    assert is_right(RecallQuestion("Say something."), "x") is None


def test_the_option_that_an_answer_comes_to() -> None:
    asked = with_options("Which one?", ["red apple", "green pear", "blue"], 1)
    assert asked.prompt == "Which one?\nA. red apple\nB. green pear\nC. blue"
    for answer, option in (
        ("B", 1), ("(C) blue", 2), ("The answer is A? No. So the answer is (B).", 1),
        ("First, A is red. Therefore, the answer is C.", 2),
        ("It is not the red apple. Therefore, it is the green pear.", 1),
        ("A pear is green.", None), ("both red apple and blue", None), ("option B", 1),
    ):  # fmt: skip
        assert extract_choice(asked, answer) == option, answer
        assert is_right(asked, answer) == (option == 1)
        assert answered(asked, answer) == (option is not None)


def test_repetition_is_counted() -> None:
    assert distinct("a b a b a b") == pytest.approx(2 / 5) and distinct("a") is None
    assert distinct("a b c d", 3) == 1 and distinct("a b", 3) is None
    assert longest_repeat("a b c d e") == 0 and longest_repeat("") is None
    assert longest_repeat("a b c x a b c y") == pytest.approx(3 / 8)
    assert longest_repeat("la " * 10) == pytest.approx(9 / 10)
    # Against every length one by one.
    for text in ("a b a c a b d a b a c", "x y z", "q q"):
        found = text.split()
        best = max(
            (n for n in range(1, len(found))
             if any(found[i : i + n] == found[j : j + n]
                    for i in range(len(found) - n + 1) for j in range(i))),
            default=0,
        )  # fmt: skip
        assert longest_repeat(text) == pytest.approx(best / len(found))


def test_prompts_say_more_as_text_and_as_chat() -> None:
    say, show = with_instruction(" Think. "), with_examples([("1+1?", "2."), ("2+2?", "4.")])
    assert say("3+3?") == "3+3?\nThink."
    assert show("3+3?") == "1+1?\n2.\n\n2+2?\n4.\n\n3+3?"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "3+3?"}]
    assert say(chat) == [chat[0], {"role": "user", "content": "3+3?\nThink."}]
    shown = show(chat)
    assert [turn["role"] for turn in shown] == ["system", *["user", "assistant"] * 2, "user"]
    assert shown[0] == chat[0] and shown[-1] == chat[-1] and shown[2]["content"] == "2."
    assert chat[1]["content"] == "3+3?"
    assert show(chat[1:])[0]["content"] == "1+1?"
    for wrong in (
        lambda: with_instruction(" "),
        lambda: with_examples([]),
        lambda: with_examples([("a", "")]),
    ):
        with pytest.raises(InvalidArgument):
            wrong()
