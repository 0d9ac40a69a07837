"""Held-out KL of continuous editors: at the target, within what so many prompts can tell.

And within 5 % where pilots of several kinds make the parts alike.
"""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

import kvedit as kv
from kvedit.evals import calibrate_strength, unrelated_prompts
from kvedit.evals.steering import Asker, Bystanders
from kvedit.steering import steered

SPAN = "the box of red things"
CONTEXT = f"There was {SPAN} on the table, and the other one was in the room with the door."
TARGET = 0.1

EDITORS = {
    "emphasize": (lambda c: kv.editors.Emphasize(SPAN, strength=c), (0.0, 2.0)),
    "suppress": (lambda c: kv.editors.Suppress(SPAN, strength=c), (0.0, 2.0)),
    "pasta": (lambda c: kv.editors.Pasta(SPAN, alpha=2.0**-c, phase="decode"), (0.05, 2.0)),
    "scale keys": (lambda c: kv.editors.ScaleKeys(SPAN, factor=1 + c), (0.0, 1.0)),
    "scale values": (lambda c: kv.editors.ScaleValues(SPAN, factor=1 + c), (0.0, 1.0)),
}


def agrees(found) -> None:
    """Checks that the two parts differ by no more than means of so many prompts do."""
    assert found.nearest.chosen_by.value == pytest.approx(TARGET, rel=0.01)
    sides = (found.nearest.chosen_by, found.nearest.held_out)
    errors = [(side.high - side.low) / (2 * 1.96) for side in sides]
    assert abs(found.error) <= 3 * math.hypot(*errors) / TARGET, found
    assert math.hypot(*errors) / TARGET < 0.2


@pytest.fixture(scope="module")
def many():
    return unrelated_prompts(200)


@pytest.fixture(scope="module")
def behind_context(tiny, many):
    asker = Asker(*tiny, kv.capture(*tiny, CONTEXT), offset="\n", max_new_tokens=8, batch_size=64)
    return Bystanders(asker, [f" {prompt}" for prompt in many])


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITORS)
def test_edits_of_a_context(behind_context, name) -> None:
    apply, bracket = EDITORS[name]
    agrees(calibrate_strength(apply, behind_context, TARGET, bracket=bracket, name=name))


@pytest.mark.slow
@pytest.mark.parametrize("site", ["keys", "values", "residual"])
def test_steering_once_and_all_along(tiny, delta, many, site) -> None:
    model, _ = tiny
    part, operand = delta.only(sites=site), delta.only(sites=site).operand()
    hold = "context" if site == "residual" else "prompt"
    asker = Asker(*tiny, hold=hold, offset="\n", chat=True, max_new_tokens=8, batch_size=64)

    def apply(strength):
        if site == "residual":
            return steered(model, part, strength)
        weights = {"keys": 0.0, "values": 0.0, site: strength}
        return lambda memory: kv.editors.Steer(**weights)(memory, operand)

    agrees(calibrate_strength(apply, Bystanders(asker, many), TARGET, name=site))


@pytest.fixture(scope="module")
def balanced(tiny):
    """Prompts behind a context, long answers, and two parts that are alike under two pilots."""
    words = ("box", "table", "room", "door", "thing", "red", "one", "other")
    prompts = [f" the {a} {b} {c}" for a, b, c in permutations(words, 3)][:240]
    asker = Asker(*tiny, kv.capture(*tiny, CONTEXT), max_new_tokens=48, batch_size=120)
    found = Bystanders(asker, prompts)
    noise = random_residual(tiny, seed=7)
    pilots = (
        lambda: kv.editors.Emphasize("the other one", strength=1.0),
        lambda: steered(tiny[0], noise, 0.4),
    )
    by = [{key: moved.kl for key, moved in found.moved(pilot).items()} for pilot in pilots]
    return found, found.split(0.5, 0, by)


def random_residual(tiny, seed):
    spec = kv.models.inspect(*tiny).spec
    drawn = torch.Generator().manual_seed(seed)
    return kv.Delta({"residual": {1: torch.randn(64, generator=drawn)}}, spec)


@pytest.mark.parametrize("name", ["emphasize", "scale keys", "scale values", "mass", "residual"])
def test_within_five_per_cent_of_prompts_that_did_not_choose(tiny, balanced, name) -> None:
    # Five mechanisms: a bias, keys, values, a rule at run time, a hook.
    vector = random_residual(tiny, seed=8)
    ways = {
        "emphasize": (lambda c: kv.editors.Emphasize(SPAN, strength=c), (0.3, 0.6)),
        "scale keys": (lambda c: kv.editors.ScaleKeys(SPAN, factor=c), (1.1, 1.2)),
        "scale values": (lambda c: kv.editors.ScaleValues(SPAN, factor=c), (1.2, 1.5)),
        "mass": (lambda c: kv.editors.SpotLight(SPAN, target=c), (0.15, 0.25)),
        "residual": (lambda c: steered(tiny[0], vector, c), (0.3, 0.5)),
    }
    apply, bracket = ways[name]
    found = calibrate_strength(
        apply, balanced[0], TARGET, bracket=bracket, parts=balanced[1], scan=2
    )
    assert found.nearest.chosen_by.value == pytest.approx(TARGET, rel=0.01)
    assert found.nearest.held_out.n == 120
    assert found.within(0.05), found
