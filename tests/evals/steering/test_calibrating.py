"""Strength at equal KL, for edits, continuous steering and ladders."""

from __future__ import annotations

import json
from statistics import fmean, stdev

import pytest

import kvedit as kv
from kvedit.errors import InvalidArgument
from kvedit.evals import calibrate_strength, random_like
from kvedit.evals.steering import Asker, Bystanders
from kvedit.steering import steered

from .conftest import PROMPTS


def one_shot(delta):
    operand = delta.operand()
    return lambda c: lambda memory: kv.editors.Steer(values=c)(memory, operand)


def continuous(model, delta):
    residual = delta.only(sites="residual")
    return lambda c: steered(model, residual, c)


def kl(bystanders, apply, strength, part):
    moved = bystanders.moved(lambda: apply(strength), part)
    return fmean(m.kl for m in moved.values())


@pytest.mark.parametrize("way", ["one-shot", "continuous"])
def test_the_strength_hits_the_target_and_other_prompts_are_reported(
    tiny, delta, once, always, way
) -> None:
    apply = one_shot(delta) if way == "one-shot" else continuous(tiny[0], delta)
    bystanders = Bystanders(once if way == "one-shot" else always, PROMPTS)
    found = calibrate_strength(apply, bystanders, 0.2, tolerance=0.01, name=way)
    first, rest = bystanders.split(0.5)
    assert found.nearest.chosen_by.value == pytest.approx(0.2, rel=0.01)
    assert kl(bystanders, apply, found.strength, first) == pytest.approx(0.2, rel=0.011)
    held = kl(bystanders, apply, found.strength, rest)
    assert found.nearest.held_out.value == pytest.approx(held, rel=1e-4)
    assert found.nearest.held_out.n == 5
    assert found.error == pytest.approx(held / 0.2 - 1, abs=1e-3)
    assert found.within(abs(found.error) + 1e-6) and not found.within(abs(found.error) / 2)
    low, high = found.nearest.held_out.low, found.nearest.held_out.high
    assert low < found.nearest.held_out.value < high
    held_out = [m.kl for m in bystanders.moved(lambda: apply(found.strength), rest).values()]
    assert found.needed == max(2, round((1.96 * stdev(held_out) / 0.01) ** 2))
    assert found.bracket is None
    assert way in repr(found) and json.loads(json.dumps(found.to_json()))["bracket"] is None


def test_a_pilot_pairs_prompts_by_how_far_it_moves_them(delta, bystanders, tmp_path) -> None:
    other = random_like(delta, seed=2)
    path = tmp_path / "pilot.jsonl"

    def pilot():
        return one_shot(other)(3.0)

    found = calibrate_strength(one_shot(delta), bystanders, 0.2, pilot=pilot, path=path)
    moved = bystanders.moved(pilot)
    by = {key: one.kl for key, one in moved.items()}
    first, rest = bystanders.split(0.5, 0, by)
    assert (first, rest) != bystanders.split(0.5)
    ranks = [sorted(by, key=by.get).index(bystanders.keys[i]) for i in first]
    assert sorted(rank // 2 for rank in ranks) == [0, 1, 2, 3, 4]
    held = kl(bystanders, one_shot(delta), found.strength, rest)
    assert found.nearest.held_out.value == pytest.approx(held, rel=1e-4)
    assert path.read_text().count('"pilot:') == 10


def test_several_pilots_make_parts_that_are_alike_in_each(delta, bystanders, tmp_path) -> None:
    path = tmp_path / "pilots.jsonl"
    others = [random_like(delta, seed=seed) for seed in (2, 3, 4)]
    pilots = [lambda other=other: one_shot(other)(3.0) for other in others]
    found = calibrate_strength(one_shot(delta), bystanders, 0.2, pilot=pilots, path=path)
    by = [{key: m.kl for key, m in bystanders.moved(pilot).items()} for pilot in pilots]
    first, rest = bystanders.split(0.5, 0, by)
    assert found.nearest.held_out.value == pytest.approx(
        kl(bystanders, one_shot(delta), found.strength, rest), rel=1e-4
    )
    assert [path.read_text().count(f'"pilot {n}:') for n in range(4)] == [10, 10, 10, 0]
    # One pilot alone, given as a list, is brought nearer still than in pairs by lot.
    single = [bystanders.split(0.5, 0, by[0]), bystanders.split(0.5, 0, by[:1])]
    number = [by[0][key] for key in bystanders.keys]
    means = [[fmean(number[i] for i in part) for part in parts] for parts in single]
    assert abs(means[1][0] - means[1][1]) <= abs(means[0][0] - means[0][1])
    with pytest.raises(InvalidArgument, match="empty"):
        bystanders.split(0.5, 0, [])


def test_parts_can_be_given_and_changed_about(delta, bystanders, tmp_path) -> None:
    path, apply = tmp_path / "parts.jsonl", one_shot(delta)
    parts = bystanders.split(0.5, seed=3)
    one = calibrate_strength(apply, bystanders, 0.2, parts=parts, path=path)
    other = calibrate_strength(apply, bystanders, 0.2, parts=parts[::-1], path=path)
    for found, (first, rest) in ((one, parts), (other, parts[::-1])):
        assert found.nearest.chosen_by.value == pytest.approx(0.2, rel=0.01)
        held = kl(bystanders, apply, found.strength, rest)
        assert found.nearest.held_out.value == pytest.approx(held, rel=1e-4)
        assert kl(bystanders, apply, found.strength, first) == pytest.approx(0.2, rel=0.011)
    assert (one.error > 0) != (other.error > 0)
    for wrong in (([], [1]), ([0], []), ([0, 1], [1, 2]), ([0], [10]), ([-1], [0])):
        with pytest.raises(InvalidArgument, match="parts"):
            calibrate_strength(apply, bystanders, 0.2, parts=wrong)


def test_two_kinds_of_steering_can_be_set_equal_over_the_same_answers(
    tiny, delta, once, always
) -> None:
    sides = Bystanders(once, PROMPTS), Bystanders(always, PROMPTS)
    assert sides[0].answers == sides[1].answers and sides[0].split(0.5) == sides[1].split(0.5)


def test_duplicates_give_both_neighbours(tiny) -> None:
    memory = kv.capture(*tiny, "There was a box of things on the table in the room.")
    bystanders = Bystanders(Asker(*tiny, memory, max_new_tokens=4), [f" {p}" for p in PROMPTS])
    asked: list[int] = []

    def apply(times):
        asked.append(times)
        return kv.editors.Duplicate("the table", times=times)

    found = calibrate_strength(apply, bystanders, 0.05, ladder=range(1, 9), scan=2)
    below, above = found.bracket
    assert above.strength == below.strength + 1 and below.chosen_by.value < 0.05
    assert above.chosen_by.value >= 0.05 and found.nearest in found.bracket
    assert {type(times) for times in asked} == {int}
    first, rest = bystanders.split(0.5)
    for end in found.bracket:
        assert end.chosen_by.value == pytest.approx(
            kl(bystanders, apply, end.strength, first), rel=1e-4
        )
        assert end.held_out.value == pytest.approx(
            kl(bystanders, apply, end.strength, rest), rel=1e-4
        )
        assert end.held_out.low is not None
    shown = json.loads(json.dumps(found.to_json()))
    assert [end["strength"] for end in shown["bracket"]] == [below.strength, above.strength]
    assert "below:" in repr(found) and "above:" in repr(found)


def test_budgets_fall_while_their_effect_rises(tiny) -> None:
    memory = kv.capture(*tiny, "There was a box of things on the table in the room. " * 3)
    bystanders = Bystanders(Asker(*tiny, memory, max_new_tokens=3), [f" {p}" for p in PROMPTS[:6]])
    found = calibrate_strength(
        lambda share: kv.editors.Truncate(budget=share, keep="last"), bystanders, 0.2,
        ladder=[1.0, 0.9, 0.75, 0.5, 0.25, 0.1],
    )  # fmt: skip
    below, above = found.bracket
    assert above.strength < below.strength and below.chosen_by.value < 0.2 <= above.chosen_by.value


def test_a_cut_search_goes_on_from_its_journal(delta, bystanders, tmp_path) -> None:
    path, calls = tmp_path / "strengths.jsonl", []
    apply = one_shot(delta)

    def counted(strength):
        calls.append(strength)
        return apply(strength)

    whole = calibrate_strength(counted, bystanders, 0.2, path=path)
    tried = len(calls)
    assert calibrate_strength(counted, bystanders, 0.2, path=path).to_json() == whole.to_json()
    assert len(calls) == tried
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:12]))
    assert calibrate_strength(counted, bystanders, 0.2, path=path).to_json() == whole.to_json()
    assert tried < len(calls) <= 2 * tried
    with pytest.raises(InvalidArgument, match="something else"):
        calibrate_strength(counted, bystanders, 0.2, path=path, name="other")


def test_numbers_are_checked(delta, bystanders) -> None:
    wrong = (
        {"target_kl": 0.0}, {"tolerance": 0.0}, {"scan": 1}, {"scan": 9, "most": 8},
        {"bracket": (1.0, 1.0)}, {"ladder": [1.0]}, {"ladder": [1.0, 1.0]}, {"share": 1.0},
    )  # fmt: skip
    for options in wrong:
        with pytest.raises(InvalidArgument):
            calibrate_strength(one_shot(delta), bystanders, **{"target_kl": 0.2, **options})
    with pytest.raises(InvalidArgument, match="not crossed"):
        calibrate_strength(lambda c: lambda memory: memory, bystanders, 0.2, grow=2)
