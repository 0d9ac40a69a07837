"""Every editor of the framework: what its strength is, or why it has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from setup import (  # beside this file
    ALL,
    LAYERS,
    ONE,
    QUESTION,
    QUOTE,
    SENTENCES,
    SEVERAL,
    SPAN,
    Lab,
)

import kvedit as kv
from kvedit.editors.compiling import Compile
from kvedit.memory import HeadSet
from kvedit.steering import steered

Apply = Callable[[float], Any]


@dataclass(frozen=True)
class Method:
    """One way to steer.

    Args:
        editor: its name in the registry, or "hook".
        unit: what the strength is.
        apply: from a strength to what steers.
        bracket: where the coarse search begins; the first end does least.
        ladder: the only strengths, from weak to strong; None for a continuous one.
        hold: what is in memory before the answer.
        grow: how often the coarse search may double its bracket.
    """

    editor: str
    unit: str
    apply: Apply
    bracket: tuple[float, float] = (0.0, 1.0)
    ladder: Sequence[float] | None = None
    hold: str = "context"
    grow: int = 6


LATER = (
    "directer, 8 layers", "gated emphasis, 8 layers", "pasta, all heads", "llm_steer, baked",
    "pasta, baked", "residual, one layer, generation", "random_keep", "key_diff", "tova",
    "expected_attention", "kv_zip",
)  # fmt: skip
"""Several passes a step, and variants: done when the others are."""

NO_STRENGTH = {
    "shift": "an offset in whole positions; RoPE is relative, so answers move by rounding alone",
    "concat": "puts memories behind each other",
    "drop": "what is there or not: a choice of slots (as the ladders of sentences and budgets)",
    "keep": "as drop",
}
"""Editors that have none."""


def continuous(lab: Lab) -> Mapping[str, Method]:
    """Returns the methods whose strength can have any value, by name."""
    return {**_bias(lab), **_keys_and_values(lab), **_steering(lab), **_rules()}


def _bias(lab: Lab) -> dict[str, Method]:
    e, memory, reader = kv.editors, lab.memory, lab.reader
    some = HeadSet.random(lab.spec, 90, seed=3)

    def reading(make: Callable[[float], Any]) -> Apply:
        """What reads with the model and edits the context."""
        return lambda c: make(c)(memory, reader=reader)

    def compiled(c: float) -> Any:
        return Compile(on_fail="keep")(e.Emphasize(SPAN, strength=c)(memory), lab.queries)

    def chained(c: float) -> Any:
        return e.Chain((e.Emphasize(SPAN, strength=c), e.Suppress(SENTENCES[0], strength=c)))

    def pasta(phase: Any, heads: Any, reference: Any) -> Callable[[float], Any]:
        return lambda c: e.Pasta(SPAN, math.exp(-c), heads, reference, phase=phase)

    return {
        "emphasize": Method("emphasize", "nats", lambda c: e.Emphasize(SPAN, strength=c), (1, 2.5)),
        "suppress all sentences": Method(
            "suppress", "nats", lambda c: e.Suppress(ALL, strength=c), (2, 6)
        ),
        "boost, both phases": Method(
            "boost", "multiplier", reading(lambda c: e.Boost(SPAN, c, phase="both")), (3, 8)
        ),
        "pasta, 90 heads": Method(
            "pasta", "-log alpha", pasta("decode", some, "rest_of_memory"), (1, 3)
        ),
        "pasta, all heads": Method(
            "pasta", "-log alpha", pasta("decode", None, "rest_of_memory"), (1, 3)
        ),
        "pasta, baked": Method(
            "pasta", "-log alpha", reading(pasta("prefill", None, "all_others")), (2, 6)
        ),
        "auto_pasta": Method(
            "auto_pasta", "-log alpha",
            reading(lambda c: e.AutoPasta(QUESTION, math.exp(-c), prompt=QUOTE, phase="decode")),
            (1, 3),
        ),
        "llm_steer, bias": Method(
            "llm_steer", "log alpha",
            reading(lambda c: e.LLMSteer(math.exp(c), fraction=0.2, apply="bias")), (0.6, 1.6),
        ),
        "llm_steer, baked": Method(
            "llm_steer", "log alpha",
            reading(lambda c: e.LLMSteer(math.exp(c), fraction=0.2, apply="baked")), (1.5, 3),
        ),
        "compile of an emphasis": Method("compile", "nats", compiled, (1, 2.5)),
        "chain of emphasis and suppression": Method("chain", "nats, of both", chained, (1, 2.5)),
    }  # fmt: skip


def _keys_and_values(lab: Lab) -> dict[str, Method]:
    e, memory, reader = kv.editors, lab.memory, lab.reader

    def seka(c: float) -> Any:
        return e.Seka(SPAN, gain_positive=c, gain_negative=c / 4)(memory, lab.projectors)

    def ada(c: float) -> Any:
        return e.AdaSeka(SPAN, f" {QUESTION}", gain=c)(memory, lab.experts, reader=reader)

    return {
        "scale_keys": Method("scale_keys", "factor", lambda c: e.ScaleKeys(SPAN, c), (1.2, 1.6)),
        "scale_values": Method(
            "scale_values", "factor", lambda c: e.ScaleValues(SPAN, c), (1.8, 3.5)
        ),
        "seka": Method("seka", "g+, 4 g-", seka, (1.5, 5)),
        "ada_seka": Method("ada_seka", "gain", ada, (0.05, 0.3)),
    }


def _rules() -> dict[str, Method]:
    e = kv.editors

    def directer(c: float) -> Any:
        return e.Directer(SPAN, factor=c, layers=LAYERS)

    def gated(c: float) -> Any:
        return e.Chain((e.Emphasize(SPAN, strength=c, layers=LAYERS), e.Gate(0.5, LAYERS)))

    return {
        "spot_light": Method(
            "spot_light", "mass", lambda c: e.SpotLight(SPAN, target=c), (0.02, 0.08), grow=3
        ),
        "directer, 8 layers": Method("directer", "factor", directer, (1.5, 3)),
        "gated emphasis, 8 layers": Method("gate", "nats, of what it gates", gated, (1.5, 4)),
    }


def _steering(lab: Lab) -> dict[str, Method]:
    def once(at: Any, keys: bool, values: bool) -> Apply:
        def apply(c: float) -> Any:
            edit = kv.editors.Steer(keys=c * keys, values=c * values, at=at)
            operand = lab.part("keys", "values").operand()
            return lambda memory: edit(memory, operand)

        return apply

    def hook(site: str, layers: Sequence[int], **options: Any) -> Apply:
        return lambda c: steered(lab.model, lab.part(site, layers=layers), c, **options)

    unit = "times the difference"
    return {
        "steer values once": Method(
            "steer", unit, once("last", False, True), (1.5, 4.5), hold="prompt"
        ),
        "steer keys once": Method("steer", unit, once("last", True, False), (6, 24), hold="prompt"),
        "steer values of the context": Method("steer", unit, once("all", False, True), (0.3, 1)),
        "residual, one layer": Method("hook", unit, hook("residual", [ONE]), (1, 5)),
        "residual, four layers": Method("hook", unit, hook("residual", SEVERAL), (0.2, 0.8)),
        "residual, one layer, generation": Method(
            "hook", unit, hook("residual", [ONE], scope="generation"), (4, 20)
        ),
        "attention, one layer": Method("hook", unit, hook("attention", [ONE]), (5, 16)),
    }  # fmt: skip


def discrete(lab: Lab) -> Mapping[str, Method]:
    """Returns the methods that have no strengths between two neighbours, by name."""
    e, memory, reader = kv.editors, lab.memory, lab.reader
    budgets = range(memory.tokens_count - 1, 3, -1)

    def selection(make: Callable[..., Any], **options: Any) -> Apply:
        return lambda c: make(budget=int(c), **options)(memory, reader=reader)

    def sentences(c: float) -> Any:
        return e.Pasta(tuple(SENTENCES[: int(c)]), 0.15, reference="all_others", phase="decode")

    return {
        "duplicate": Method(
            "duplicate", "times", lambda c: e.Duplicate(SPAN, times=int(c)), ladder=range(1, 33)
        ),
        "sentences at alpha 0.15": Method(
            "pasta", "sentences", sentences, ladder=range(1, len(SENTENCES) + 1)
        ),
        "truncate": Method("truncate", "slots", selection(e.Truncate), ladder=budgets),
        "streaming_llm": Method(
            "streaming_llm", "slots", selection(e.StreamingLLM), ladder=budgets[:-1]
        ),
        "knorm": Method("knorm", "slots", selection(e.Knorm), ladder=budgets),
        "snap_kv": Method("snap_kv", "slots", selection(e.SnapKV, window=4), ladder=budgets[:-4]),
        "attention_matching": Method(
            "attention_matching", "slots", selection(e.AttentionMatching), ladder=budgets[::3]
        ),
        "random_keep": Method("random_keep", "slots", selection(e.RandomKeep), ladder=budgets),
        "key_diff": Method("key_diff", "slots", selection(e.KeyDiff), ladder=budgets),
        "tova": Method("tova", "slots", selection(e.TOVA), ladder=budgets),
        "expected_attention": Method(
            "expected_attention", "slots", selection(e.ExpectedAttention), ladder=budgets[:-2]
        ),
        "kv_zip": Method("kv_zip", "slots", selection(e.KVZip), ladder=budgets[:-2]),
    }  # fmt: skip
