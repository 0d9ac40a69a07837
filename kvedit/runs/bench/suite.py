"""bench: runs a plan and returns its report."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvedit.editors import build
from kvedit.memory import KVMemory, Span
from kvedit.memory.lineage import environment
from kvedit.memory.rules import MassRule, write_rule
from kvedit.models.loading import TINY
from kvedit.runs.bench.pairs import Timed, alternate
from kvedit.runs.bench.plan import Plan
from kvedit.runs.bench.prose import prose
from kvedit.runs.bench.report import Bar, Ratio, Report
from kvedit.runs.bench.sides import Sides
from kvedit.runs.bench.steering import steered_sides
from kvedit.runs.verbs.options import load_model
from kvedit.runtime import calibrate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["bench"]

CAPTURE_BAR = Bar(at_most=1.05)
DECODE_BAR = Bar(at_most=1.10)
RULE_BAR = Bar(at_most=1.25)
ONCE_BAR = Bar(at_most=1.02)  # the same kernels over the same shapes: 1.00, and the clock's noise
HOOK_BAR = Bar(at_most=1.05)
REUSE_BAR = Bar(at_least=20)
REUSE_FROM = 4000  # tokens of context from which the bar on reuse is meant

_SAMPLES = 100  # queries per head behind the compiled keys
_SPAN = 12  # tokens that are steered; bias and rules cover every slot, whatever the span
_MASS = 0.3  # of a rule without raise_only, so that every head of every layer is moved


def bench(plan: Plan) -> Report:
    """Returns the report of a plan: per length, eight ratios. A missed bar raises nothing.

    Raises:
        ContextTooLong: if the model has too few positions for the longest context.
    """
    from kvedit.models.inspection import inspect

    started = time.perf_counter()
    with _threads(plan.threads):
        model, tokenizer = load_model(plan.model, plan.dtype, plan.device, None)
        plan.check_room(inspect(model, tokenizer).spec.max_position)
        sizes: dict[int, int] = {}
        ratios: list[Ratio] = []
        sample = [prose(tokenizer, 4 * _SAMPLES)]
        queries = calibrate(model, tokenizer, sample, sample, samples=_SAMPLES)
        with tempfile.TemporaryDirectory(prefix="kvedit-bench-") as folder, _ticking(plan) as tick:
            for length in plan.lengths:
                text = prose(tokenizer, length)
                place = Path(folder) / str(length)
                sides = Sides.prepare(model, tokenizer, text, place, plan.decode)
                sizes[sides.memory.tokens_count] = sides.memory.nbytes
                ratios += _measure(sides, queries, plan, tick)
        seconds = time.perf_counter() - started
        return Report(plan.model, _environment(model), plan.decode, sizes, tuple(ratios), seconds)


def _measure(
    sides: Sides, queries: KVMemory, plan: Plan, tick: Callable[[], None]
) -> Iterator[Ratio]:
    tokens = sides.memory.tokens_count
    # A toy is all overhead: the bars mean models that compute for longer than they are called.
    real = not sides.model.name_or_path.startswith(TINY)
    capture_bar, decode_bar = (CAPTURE_BAR, DECODE_BAR) if real else (None, None)
    rule_bar, once_bar, hook_bar = (RULE_BAR, ONCE_BAR, HOOK_BAR) if real else (None,) * 3
    reuse_bar = REUSE_BAR if real and tokens >= REUSE_FROM else None
    emphasise = build("emphasize", span={"tokens": (0, min(_SPAN, tokens))}, strength=1.0)
    emphasised = emphasise(sides.memory)
    biased, without = sides.decoding(emphasised), sides.decoding(sides.memory)
    compiled = sides.decoding(_compiled(emphasised, queries))
    ruled = sides.decoding(_ruled(sides.memory, min(_SPAN, tokens)))
    once, hooked = steered_sides(sides)
    plain = sides.plain_decoding()
    # First calls allocate; prefills are long enough, and one has run already.
    for side in (biased, compiled, ruled, once, hooked, without, plain, sides.time_reuse):
        side()
    long = plan.prefill_pairs(tokens)
    measured: tuple[tuple[str, Timed, Timed, int, Bar | None], ...] = (
        ("capture / prefill", sides.time_capture, sides.time_prefill, long, capture_bar),
        ("decode, bias / no bias", biased, without, plan.pairs, decode_bar),
        ("decode, compiled / no bias", compiled, without, plan.pairs, decode_bar),
        ("decode, mass rule / none", ruled, without, plan.pairs, rule_bar),
        ("decode, steered once / not", once, without, plan.pairs, once_bar),
        ("decode, steering hooks / none", hooked, without, plan.pairs, hook_bar),
        ("decode, no bias / plain", without, plain, plan.pairs, decode_bar),
        (
            "prefill to first token / reuse",
            sides.time_first_token,
            sides.time_reuse,
            long,
            reuse_bar,
        ),
    )
    for name, a, b, pairs, bar in measured:
        yield Ratio.of(name, tokens, alternate(a, b, pairs, tick), bar)


def _compiled(memory: KVMemory, queries: KVMemory) -> KVMemory:
    # Time does not depend on what is certified: every head is compiled, also a toy's.
    anything = {"mean_tolerance": 1e9, "spread_tolerance": 1e9}
    compiled: KVMemory = build("compile", on_fail="refuse", **anything)(memory, queries)
    return compiled


def _ruled(memory: KVMemory, stop: int) -> KVMemory:
    rule = MassRule(Span(((0, stop),)), _MASS, raise_only=False)
    return replace(memory, rules=(write_rule(rule),))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _ticking(plan: Plan) -> Iterator[Callable[[], None]]:
    from tqdm.auto import tqdm

    pairs = sum(6 * plan.pairs + 2 * plan.prefill_pairs(length) for length in plan.lengths)
    # disable=None: no bar where stderr is no terminal.
    with tqdm(total=2 * pairs, desc="bench", unit="run", disable=None) as bar:

        def tick() -> None:
            bar.update()

        yield tick


def _environment(model: PreTrainedModel) -> dict[str, str]:
    found = dict(environment(model.dtype))
    found["threads"] = str(torch.get_num_threads())
    device = str(model.device)
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    return {
        **found,
        "processors": str(os.cpu_count()),
        "machine": platform.machine(),
        "device": device,
        "attention": str(model.config._attn_implementation),
    }
