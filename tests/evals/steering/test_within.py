"""Held-out KL of continuous editors: at the target, within what so many prompts can tell."""

from __future__ import annotations

import math

import pytest

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
