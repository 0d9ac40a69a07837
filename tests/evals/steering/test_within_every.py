"""Every editor with a continuous strength, and every site of a hook: held-out KL within 5 %."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors.seka import learn_experts, learn_projectors, synthetic_triplets
from kvedit.evals import calibrate_strength
from kvedit.evals.steering import Asker, Bystanders
from kvedit.runtime import ModelReader
from kvedit.steering import steered

SPAN, OTHER = "the box of red things", "the other one"
CONTEXT = f"There was {SPAN} on the table, and {OTHER} was in the room with the door."
WORDS = ("box", "table", "room", "door", "thing", "red", "one", "other", "was", "on")
TARGET, PROMPTS, SEED = 0.02, 480, 0

e = kv.editors

# Each: from model, memory, delta and reader to what a strength does; and where the search begins.
# A strength of 0 does nothing, or close to it.
EDITORS: dict[str, Any] = {
    "emphasize": (lambda a: lambda c: e.Emphasize(SPAN, strength=c), (0.0, 1.0)),
    "suppress": (lambda a: lambda c: e.Suppress(SPAN, strength=c), (0.0, 1.0)),
    "boost": (
        lambda a: lambda c: e.Boost(SPAN, 1 + c, phase="both")(a.memory, reader=a.reader),
        (0.0, 1.0),
    ),
    "pasta": (lambda a: lambda c: e.Pasta(SPAN, math.exp(-c), phase="decode"), (0.0, 1.0)),
    "llm_steer": (
        lambda a: (
            lambda c: e.LLMSteer(math.exp(c), fraction=0.3, apply="bias")(a.memory, reader=a.reader)
        ),
        (0.0, 1.0),
    ),
    "llm_steer baked": (
        lambda a: (
            lambda c: e.LLMSteer(math.exp(c), fraction=0.3, apply="baked")(
                a.memory, reader=a.reader
            )
        ),
        (0.0, 1.0),
    ),
    "pasta baked": (
        lambda a: (
            lambda c: e.Pasta(SPAN, math.exp(-c), reference="all_others", phase="prefill")(
                a.memory, reader=a.reader
            )
        ),
        (0.0, 1.0),
    ),
    "scale_keys": (lambda a: lambda c: e.ScaleKeys(SPAN, 1 + c), (0.0, 1.0)),
    "scale_values": (lambda a: lambda c: e.ScaleValues(SPAN, 1 + c), (0.0, 1.0)),
    "seka": (
        lambda a: (
            lambda c: e.Seka(SPAN, gain_positive=c, gain_negative=0.0)(a.memory, a.projectors)
        ),
        (0.0, 1.0),
    ),
    "ada_seka": (
        lambda a: (
            lambda c: e.AdaSeka(SPAN, " Was it red?", gain=c)(a.memory, a.experts, reader=a.reader)
        ),
        (0.0, 1.0),
    ),
    "spot_light": (lambda a: lambda c: e.SpotLight(SPAN, target=c), (0.05, 0.6)),
    "directer": (lambda a: lambda c: e.Directer(SPAN, factor=1 + c), (0.0, 1.0)),
    "gate": (
        lambda a: lambda c: e.Chain((e.Emphasize(SPAN, strength=c), e.Gate(0.2))),
        (0.0, 1.0),
    ),
    "compile": (
        lambda a: (
            lambda c: e.Compile(on_fail="keep")(e.Emphasize(SPAN, strength=c)(a.memory), a.queries)
        ),
        (0.01, 1.0),
    ),
    "steer values": (
        lambda a: lambda c: lambda m: e.Steer(values=c, at="all")(m, a.operand),
        (0.0, 1.0),
    ),
    "steer keys": (
        lambda a: lambda c: lambda m: e.Steer(keys=c, values=0.0, at="all")(m, a.operand),
        (0.0, 1.0),
    ),
    "residual": (lambda a: lambda c: steered(a.model, a.delta.only(sites="residual"), c), (0, 1)),
    "generation": (
        lambda a: lambda c: steered(a.model, a.delta.only(sites="residual"), c, scope="generation"),
        (0.0, 1.0),
    ),
    "attention": (lambda a: lambda c: steered(a.model, a.delta.only(sites="attention"), c), (0, 1)),
}


class Lab:
    """The tiny model with all that editors compute with, and prompts in two parts."""

    def __init__(self, tiny: Any) -> None:
        self.model, self.tokenizer = tiny
        self.reader = ModelReader(*tiny)
        self.memory = kv.capture(*tiny, CONTEXT)
        spec = self.memory.model
        self.delta = drawn(spec, 3)
        self.operand = self.delta.only(sites=("keys", "values")).operand()
        triplets = synthetic_triplets(SEED, 24)
        self.projectors = learn_projectors(self.reader, spec, triplets)
        self.experts = learn_experts(self.reader, spec, {"a": triplets[:12], "b": triplets[12:]})
        self.queries = kv.calibrate(*tiny)
        prompts = [f" the {a} {b} {c}" for a, b, c in permutations(WORDS, 3)][:PROMPTS]
        asker = Asker(*tiny, self.memory, max_new_tokens=48, batch_size=120)
        self.bystanders = Bystanders(asker, prompts)
        self.parts = self.bystanders.split(0.5, SEED, self._pilots(drawn(spec, 4)))

    def _pilots(self, other: kv.Delta) -> list[dict[str, float]]:
        """KLs of other spans and directions, in which the parts are made alike."""
        values = other.only(sites="values").operand()
        pilots = (
            lambda: e.Emphasize(OTHER, strength=1.0),
            lambda: e.ScaleValues(OTHER, 1.5),
            lambda: lambda memory: e.Steer(values=0.3, at="all")(memory, values),
            lambda: steered(self.model, other.only(sites="residual"), 0.2),
        )
        return [{k: m.kl for k, m in self.bystanders.moved(p).items()} for p in pilots]


def drawn(spec: Any, seed: int) -> kv.Delta:
    draw = torch.Generator().manual_seed(seed)

    def vector(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    heads, dim = spec.layers[1].kv_heads, spec.layers[1].key_dim
    sites = {name: {1: vector(heads, dim)} for name in ("keys", "values")}
    return kv.Delta(
        {**sites, **{name: {1: vector(64)} for name in ("residual", "attention")}}, spec
    )


@pytest.fixture(scope="module")
def lab(tiny: Any) -> Lab:
    return Lab(tiny)


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITORS)
def test_within_five_per_cent(lab: Lab, name: str) -> None:
    make, bracket = EDITORS[name]
    found = calibrate_strength(
        make(lab), lab.bystanders, TARGET, bracket=bracket, parts=lab.parts, scan=2, name=name
    )
    print(found, f"{found.error:+.3f}")
    assert found.nearest.chosen_by.value == pytest.approx(TARGET, rel=0.02)
    assert found.nearest.held_out.n == PROMPTS // 2
    assert found.within(0.05), found
