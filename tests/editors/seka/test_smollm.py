"""SEKA on SmolLM2: conflicting facts, learned projectors against random ones; prints figures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import kvedit as kv
from kvedit.editors import AdaSeka, ScaleKeys, Seka
from kvedit.editors.seka import (
    effective_bias,
    learn_experts,
    learn_projectors,
    random_projectors,
    synthetic_triplets,
)
from kvedit.memory import KVMemory
from kvedit.memory.operand import operand_facts
from kvedit.models.inspection import inspect
from kvedit.runtime import ModelReader

pytestmark = pytest.mark.slow

SEED, TRIPLETS, EXPERT_TRIPLETS, CONTROLS, DRAWS = 0, 60, 10, 4, 2000
CAPITALS = (
    "France Paris, Spain Madrid, Italy Rome, Germany Berlin, Poland Warsaw, Austria Vienna, "
    "Hungary Budapest, Portugal Lisbon, Greece Athens, Ireland Dublin, Norway Oslo, "
    "Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Russia Moscow, Ukraine Kiev, "
    "Turkey Ankara, Egypt Cairo, Kenya Nairobi, Japan Tokyo, China Beijing, Cuba Havana, "
    "Peru Lima, Chile Santiago, Canada Ottawa, Iraq Baghdad, Iran Tehran, Syria Damascus, "
    "Thailand Bangkok, Vietnam Hanoi"
)
LANGUAGES = (
    "France French, Spain Spanish, Italy Italian, Germany German, Poland Polish, "
    "Hungary Hungarian, Portugal Portuguese, Greece Greek, Norway Norwegian, Sweden Swedish, "
    "Finland Finnish, Denmark Danish, Russia Russian, Turkey Turkish, Japan Japanese, "
    "China Chinese, Thailand Thai, Vietnam Vietnamese"
)


def conflicts() -> Iterator[tuple[str, str, str, str, str]]:
    """Context, highlighted fact, question, old and new answer; none is about invented people."""
    draw = random.Random(SEED)
    for relation, listed in (("the capital of", CAPITALS), ("the language of", LANGUAGES)):
        pairs = [pair.split() for pair in listed.split(", ")]
        new = [answer for _, answer in pairs]
        while any(answer == changed for (_, answer), changed in zip(pairs, new, strict=True)):
            draw.shuffle(new)
        for (place, old), changed in zip(pairs, new, strict=True):
            fact = f"{relation} {place}"
            text = f"Previously, {fact} was {old}. Currently, {fact} is {changed}."
            yield text, f"{fact} is {changed}", f" T{fact[1:]} is", old, changed


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval, over prompts."""
    rng = np.random.default_rng(SEED)
    picks = rng.integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def test_the_highlighted_fact_gains(smollm: Any) -> None:
    model, tokenizer = smollm
    reader, spec = ModelReader(model, tokenizer), inspect(model, tokenizer).spec
    learned = learn_projectors(reader, spec, synthetic_triplets(SEED, TRIPLETS))
    cases = list(conflicts())
    memories = kv.capture(model, tokenizer, [context for context, *_ in cases])

    def measure(edit: Callable[[KVMemory, str], KVMemory]) -> np.ndarray:
        """Probabilities [case, (new, old)] of the answers' first tokens."""
        rows = []
        for memory, (_, span, question, *answers) in zip(memories, cases, strict=True):
            with kv.attach(model, edit(memory, span)) as session:
                logits = session.forward(reader.encode(question)[None], keep=1)[0, -1]
            first = [int(reader.encode(f" {answer}")[0]) for answer in answers]
            rows.append(logits.double().softmax(-1)[first].flip(0).numpy())
        return np.stack(rows)

    plain = measure(lambda memory, span: memory)
    sets = {f"templates-{seed}": synthetic_triplets(seed, EXPERT_TRIPLETS) for seed in range(3)}
    experts = learn_experts(reader, spec, sets)
    asked = {span: question for _, span, question, *_ in cases}
    layers = operand_facts(learned, "projectors")["layers"]
    heads = {str(entry["layer"]): list(range(len(entry["difference"]))) for entry in layers}
    edits: dict[str, Callable[[KVMemory, str], KVMemory]] = {
        f"learned {plus} {minus}": lambda m, s, p=plus, n=minus: Seka(s, p, n)(m, learned)
        for plus, minus in ((0.8, 0.2), (0.8, None), (-0.8, None))
    }
    for seed in range(CONTROLS):
        drawn = random_projectors(learned, seed)
        edits[f"random {seed}"] = lambda m, s, o=drawn: Seka(s)(m, o)
    edits["adaptive"] = lambda m, s: AdaSeka(s, asked[s])(m, experts, reader=reader)
    for factor in (1.1, 1.4):
        edits[f"scaled {factor}"] = lambda m, s, f=factor: ScaleKeys(s, f, kv_heads=heads)(m)
    found = {name: measure(edit) for name, edit in edits.items()}
    gains = {name: interval(made[:, 0] - plain[:, 0]) for name, made in found.items()}
    print(f"\nn={len(cases)}, seed {SEED}; plain: {described(plain)}")
    for name, made in found.items():
        wins = interval((made[:, 0] > made[:, 1]) * 1.0 - (plain[:, 0] > plain[:, 1]))
        edited = edits[name](memories[0], cases[0][1])
        nats = effective_bias(memories[0], edited, reader, [cases[0][2]]).summary()
        print(
            f"{name}: {described(made)}; P(new) {shown(gains[name])}, efficacy {shown(wins)}; first"
            f" prompt {nats['mean']:+.2f} nats, spread {nats['spread']:.2f}"
        )
    for seed in range(CONTROLS):
        gap = found["learned 0.8 0.2"][:, 0] - found[f"random {seed}"][:, 0]
        print(f"P(new), learned minus random {seed}: {shown(interval(gap))}")
    assert gains["learned 0.8 0.2"][1] > 0
    assert gains["adaptive"][1] > 0


def described(made: np.ndarray) -> str:
    new, old = made.mean(axis=0)
    return f"P(new) {new:.3f}, P(old) {old:.3f}, efficacy {(made[:, 0] > made[:, 1]).mean():.3f}"


def shown(found: tuple[float, float, float]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*found)
