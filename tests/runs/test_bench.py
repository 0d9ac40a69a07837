"""bench on a toy: the shape of its report and the arithmetic of its ratios, never a time."""

import itertools
import json

import pytest
import torch

from kvedit.errors import ContextTooLong, InvalidArgument
from kvedit.models import tiny_model
from kvedit.runs.bench import Plan, Ratio, bench, steering
from kvedit.runs.bench.pairs import Pair, Seconds, alternate
from kvedit.runs.bench.prose import prose
from kvedit.runs.bench.report import Bar
from kvedit.runs.bench.sides import Sides
from kvedit.runs.bench.steering import any_delta
from kvedit.runs.cli import main

NAMES = [
    "capture / prefill",
    "decode, bias / no bias",
    "decode, compiled / no bias",
    "decode, mass rule / none",
    "decode, steered once / not",
    "decode, steering hooks / none",
    "decode, no bias / plain",
    "prefill to first token / reuse",
]


def test_a_report_has_every_ratio_at_every_length():
    before = torch.get_num_threads()
    report = bench(Plan("tiny:llama", lengths=(24, 48), pairs=2, decode=3))
    assert torch.get_num_threads() == before
    assert [ratio.name for ratio in report.ratios] == NAMES * 2
    assert len(report.sizes) == 2
    assert all(tokens <= length for tokens, length in zip(report.sizes, (24, 48), strict=True))
    for ratio in report.ratios:
        assert ratio.pairs == 2
        assert 0 < ratio.low <= ratio.quartiles[0] <= ratio.median <= ratio.quartiles[1]
        assert ratio.quartiles[1] <= ratio.high
        assert (ratio.bar, ratio.holds) == (None, None)  # a toy has no bar to hold
    assert {"torch", "transformers", "threads", "processors"} <= set(report.environment)


def test_what_is_timed_is_steered(tmp_path, monkeypatch):
    model, tokenizer = tiny_model("llama")
    sides = Sides.prepare(model, tokenizer, prose(tokenizer, 40), tmp_path, decode=3)
    delta = any_delta(model, sides.memory.model)
    assert delta.sites == ("keys", "values", "residual") and delta.layers == (0, 1, 2)
    seen, memories = [], []
    monkeypatch.setattr(
        type(sides), "_greedy", lambda self, first, step: seen.append(step(first)[0, -1])
    )
    real = steering.Steer.__call__

    def kept(self, *inputs):
        memories.append(real(self, *inputs))
        return memories[-1]

    monkeypatch.setattr(steering.Steer, "__call__", kept)
    for side in (sides.decoding(sides.memory), *steering.steered_sides(sides)):
        side()
    plain, once, hooked = seen
    assert memories[0].digest != sides.memory.digest and memories[0].slots == sides.memory.slots
    for other in (once, hooked):
        assert 1e-6 < float((other - plain).abs().max()) < 0.5


def test_the_command_writes_one_document(tmp_path, capsys):
    out = tmp_path / "bench.json"
    words = ["bench", "--model", "tiny:llama", "--lengths", "24", "--pairs", "1", "--decode", "2"]
    assert main([*words, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert [ratio["name"] for ratio in printed["ratios"]] == NAMES
    assert main([*words, "--out", str(tmp_path / "no" / "folder.json")]) == 1


def test_ratios_are_medians_of_pairs():
    pairs = [Pair(Seconds(a, a), Seconds(b, 1)) for a, b in ((2, 1), (9, 3), (4, 4))]
    found = Ratio.of("x", 7, pairs, Bar(at_most=2))
    assert (found.median, found.low, found.high, found.pairs) == (2, 1, 3, 3)
    assert (found.a_seconds, found.b_seconds, found.cpu) == (4, 3, 4)
    assert found.quartiles == (1.5, 2.5)
    assert found.holds
    assert Ratio.of("x", 7, pairs, Bar(at_least=20)).holds is False
    assert (str(Bar(at_most=1.05)), str(Bar(at_least=20))) == ("<= 1.05", ">= 20")


def test_sides_take_turns_in_alternating_order():
    order, clock = [], itertools.count(1)

    def side(name):
        def run():
            order.append(name)
            return Seconds(next(clock), 0)

        return run

    found = alternate(side("a"), side("b"), 3, tick=lambda: order.append("."))
    assert "".join(order) == "a.b.b.a.a.b."
    assert [(pair.a.wall, pair.b.wall) for pair in found] == [(1, 2), (4, 3), (5, 6)]


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_prose_is_fixed_and_fits(tokens):
    _, tokenizer = tiny_model("llama")
    text = prose(tokenizer, tokens)
    assert text == prose(tokenizer, tokens)
    count = len(tokenizer(text)["input_ids"])
    assert tokens - 25 <= count <= tokens
    assert prose(tokenizer, 300).startswith(text)


def test_plans_are_checked():
    with pytest.raises(InvalidArgument, match="pairs"):
        Plan(pairs=0)
    with pytest.raises(InvalidArgument, match="lengths"):
        Plan(lengths=())
    with pytest.raises(ContextTooLong, match="positions"):
        bench(Plan("tiny:llama", lengths=(16384,)))
    assert Plan().prefill_pairs(4096) < Plan().prefill_pairs(1024)
