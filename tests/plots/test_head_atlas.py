"""head_atlas: every head in its cell, colours around zero, and what it refuses to draw."""

import dataclasses

import pytest

import kvedit as kv
from kvedit.errors import InvalidArgument
from kvedit.evals.profiling import HeadAtlas, HeadScore
from kvedit.memory.heads import HeadSet
from kvedit.models import tiny_model
from kvedit.plots import head_atlas

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def found():
    model, tokenizer = tiny_model("llama")
    spec = kv.capture(model, tokenizer, "x").model
    gains = {(0, 1): 2.0, (2, 0): 0.5, (1, 1): 0.25, (1, 0): -4.0}
    scores = tuple(
        HeadScore(HeadSet.of([pair], "kv"), gain, (gain - 0.3, gain + 0.3), 0.5, None, abs(gain))
        for pair, gain in gains.items()
    )
    facts = {"strength": 4.6, "phase": "decode", "rerun": "last", "continuation": "whole"}
    facts |= {"n": 9, "seed": 0, "base_margin": -1.0, "base_efficacy": 0.2, "probes": "ab"}
    facts |= {"version": "0", "minutes": 0.5, "kind": "kv", "search": "heads", "model": spec}
    return HeadAtlas(scores=scores, **facts)


def drawn(figure):
    assert figure._repr_png_().startswith(b"\x89PNG")
    axes, bar = figure.axes
    return axes, axes.images[0], bar


def test_every_head_has_its_cell(found):
    axes, image, bar = drawn(head_atlas(found, marked=2))
    cells = image.get_array()
    assert cells.shape == (2, 3)  # KV heads by layers
    assert [float(cells[h, i]) for i, h in ((0, 1), (2, 0), (1, 1), (1, 0))] == [2, 0.5, 0.25, -4]
    assert cells.mask[0, 0] and cells.mask[1, 2]  # not tried
    assert (image.norm.vmin, image.norm.vmax) == (-4, 4)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "KV head")
    assert bar.get_ylabel() == "gain, nats"
    assert {text.get_text(): text.get_position() for text in axes.texts} == {
        "1": (0, 1),
        "2": (2, 0),
    }
    dots = {tuple(line.get_xydata()[0].tolist()) for line in axes.lines}
    assert dots == {(1, 0)}  # clear of zero and not numbered; (1, 1) is not clear
    assert "4.6 nats, n=9" in axes.get_title()


def test_other_values(found):
    _, image, bar = drawn(head_atlas(found, "kl"))
    assert float(image.get_array()[0, 1]) == 4.0 and image.norm.vmin == 0
    assert bar.get_ylabel() == "unrelated KL, nats"
    _, image, _ = drawn(head_atlas(found, "efficacy"))
    assert float(image.get_array()[1, 0]) == 50.0


def test_what_can_not_be_drawn_is_refused(found):
    with pytest.raises(InvalidArgument, match="'efficacy', 'gain', 'kl'"):
        head_atlas(found, "cost")
    wide = dataclasses.replace(found.scores[0], heads=HeadSet.of([(0, (0, 1))], "kv"))
    with pytest.raises(InvalidArgument, match="several heads"):
        head_atlas(dataclasses.replace(found, scores=(wide,)))
    bare = dataclasses.replace(found.scores[0], kl=None)
    with pytest.raises(InvalidArgument, match="no kl"):
        head_atlas(dataclasses.replace(found, scores=(bare,)), "kl")
