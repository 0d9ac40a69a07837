"""On a model that reads: emphasis makes new facts win, and costs something."""

from __future__ import annotations

from typing import Any

import pytest

import kvedit as kv
from kvedit.evals import Prefills, by_editor, capitals, difference, evaluate, mark

pytestmark = pytest.mark.slow


def test_emphasis_wins_conflicts_and_moves_other_answers(smollm: Any) -> None:
    model, tokenizer = smollm
    cases, kept = capitals(16), Prefills(model, tokenizer)
    reports = [
        evaluate(
            model,
            tokenizer,
            cases,
            by_editor(lambda span, b=strength: kv.editors.Emphasize(span, strength=b)),
            strength=strength,
            mass=True,
            prefills=kept,
        )
        for strength in (0.0, 1.4, 3.5)
    ]
    plain, some, loud = reports
    assert plain.kl.value == 0 < some.kl.value < loud.kl.value
    for stronger, weaker in ((some, plain), (loud, some)):
        gained = difference(stronger, weaker, "delta_logp")
        assert gained.value > 0 and gained.clear
        assert bool((stronger.mass() >= weaker.mass()).float().mean() > 0.9)
    assert difference(loud, plain).clear
    marked = evaluate(model, tokenizer, cases[:4], transform=mark, prefills=kept)
    assert marked.kl.value > 0
