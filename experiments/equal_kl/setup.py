"""What is fixed before the runs: target, prompts, pilots, parts, context, spans, operands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import kvedit as kv
from kvedit.editors.seka import learn_experts, learn_projectors, synthetic_triplets
from kvedit.evals import random_like, unrelated_prompts
from kvedit.evals.steering import Asker, Bystanders
from kvedit.evals.steering.parting import draw_parts
from kvedit.evals.steering.unrelated import _ASKED as TEMPLATES
from kvedit.models.inspection import inspect
from kvedit.runtime import ModelReader, calibrate
from kvedit.steering import Contrast, extract, persona, steered

# Written down before the runs; nothing of it was changed after looking at a result.
TARGET = 0.05
"""KL(base‖steered), nats per token. First looks (120 other prompts) showed what most editors reach:
suppression of one sentence ends at 0.003, of all sentences near 0.08, so it is all of them."""
SEED, BATCH = 1, 32
SHARE = 0.5
TOLERANCE, COARSE_TOLERANCE = 0.01, 0.08
COARSE = 24
"""Prompts of the choosing part by which the bracket of the real search is found."""
WIDTH = 0.12
"""Half-width of that bracket, as a share of the strength."""

CONTEXT = (
    "Notes for guests of the mountain hut. The hut opens in June and closes in October. Breakfast "
    "is served from six to eight. The path to the lake is closed because of falling rocks. Boots "
    "stay in the room beside the door. Water from the tap is safe to drink. Lights go out at ten, "
    "and the next bus leaves at nine in the morning."
)
SPAN = "The path to the lake is closed because of falling rocks."
ALL = {"regex": "The hut opens.*morning."}
PILOT_SPAN = "Boots stay in the room beside the door."
"""Pilots act here: no method does, but those that act on everything."""
QUESTION = "Which path is closed because of falling rocks?"
QUOTE = "{question} Quote the sentence of the notes that tells it."
"""How AutoPASTA asks: over these notes its own prompt gets no quote from this model."""
SENTENCES = [f"{part}." for part in CONTEXT.removesuffix(".").split(". ")][1:]
LAYERS = tuple(range(10, 18))
"""Layers of the gated rules: fewer layers, fewer passes."""
ONE, SEVERAL = 16, (8, 12, 16, 20)
TRIPLETS = 32
REQUESTS = (
    "Help me to plan a picnic.", "Describe your kitchen.", "How do I wash a woollen jumper?",
    "Tell me about your day.", "What should I cook tonight?", "Write a note to a neighbour.",
    "How does a bicycle stay upright?", "Give me a reason to go for a walk.",
    "What is the weather like in autumn?", "Suggest a name for a cat.", "Why does a door squeak?",
    "What makes a good friend?", "Write the first line of a story.", "How do I learn to swim?",
    "What do you think of Mondays?", "Explain how bread is baked.",
)  # fmt: skip


@dataclass(frozen=True)
class Design:
    """How much is read.

    Args:
        prompts: how many.
        tokens: of an answer.
        kinds: whether the parts are alike in how many prompts come of each question template, too.
    """

    prompts: int
    tokens: int
    kinds: bool


DESIGNS = {"first": Design(240, 8, False), "second": Design(400, 16, True)}
"""The second was written down when four methods of the first were known (errors of -7 to +10 %): it
was seen there that pilots explain half to three quarters of the spread, templates some more, and
that the rest allows for errors of that size with so few prompts of so few tokens."""


class Lab:
    """The model, its operands, two ways of asking, and the parts: each made when it is needed."""

    def __init__(self, folder: Path, design: Design = DESIGNS["first"]) -> None:
        """Loads the model; the folder is that of pilots' KLs and journals of this design."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.design = folder, design
        self.model, self.tokenizer = kv.load("smollm2-135m")
        self.spec = inspect(self.model, self.tokenizer).spec
        self.reader = ModelReader(self.model, self.tokenizer)
        # What the first looks asked is not asked again.
        looked = {*unrelated_prompts(96, 0), *unrelated_prompts(644, 0)[620:]}
        every = [prompt for prompt in unrelated_prompts(650, SEED) if prompt not in looked]
        self.prompts = every[: design.prompts]

    @cached_property
    def memory(self) -> kv.KVMemory:
        """The context, as a system message."""
        return kv.capture(self.model, self.tokenizer, [{"role": "system", "content": CONTEXT}])

    @cached_property
    def bystanders(self) -> dict[str, Bystanders]:
        """By what is in memory before the answer: the context, or context and prompt.

        Tokens, answers and distributions of the unedited model are the same.
        """
        return {hold: Bystanders(self._asker(hold), self.prompts, 4 << 30)
                for hold in ("context", "prompt")}  # fmt: skip

    def _asker(self, hold: Any) -> Asker:
        return Asker(self.model, self.tokenizer, self.memory, hold=hold, offset="\n",
                     max_new_tokens=self.design.tokens, batch_size=BATCH)  # fmt: skip

    @cached_property
    def delta(self) -> kv.Delta:
        """Cheerful against gloomy, at the last token of prompts that are asked nowhere else."""
        pairs = persona(REQUESTS, "a very cheerful person", "a very gloomy person")
        sites = ("keys", "values", "residual", "attention")
        return extract(self.model, self.tokenizer, Contrast.of(pairs), sites=sites,
                       folder=self.folder / "read")  # fmt: skip

    def part(self, *sites: str, layers: Sequence[int] | None = None) -> kv.Delta:
        """Returns a part of the delta; of keys and values not the first layer, as in the paper."""
        wanted = range(1, len(self.spec.layers)) if layers is None else layers
        return self.delta.only(sites=sites, layers=wanted)

    @cached_property
    def projectors(self) -> kv.KVMemory:
        """For SEKA."""
        return learn_projectors(self.reader, self.spec, synthetic_triplets(SEED, TRIPLETS))

    @cached_property
    def experts(self) -> kv.KVMemory:
        """For AdaSEKA: two."""
        sets = {f"templates-{seed}": synthetic_triplets(seed, TRIPLETS // 2) for seed in (1, 2)}
        return learn_experts(self.reader, self.spec, sets)

    @cached_property
    def queries(self) -> kv.KVMemory:
        """For compiled bias."""
        return calibrate(self.model, self.tokenizer)

    @cached_property
    def by(self) -> list[dict[str, float]]:
        """What the parts are alike in: KLs of all pilots, prompt by prompt, and kinds."""
        found = [self._piloted(name, *pilot) for name, pilot in pilots(self).items()]
        return [*found, *self._kinds()] if self.design.kinds else found

    def _kinds(self) -> list[dict[str, float]]:
        # The last kind is none of the others.
        every = [text.split("{}") for texts in TEMPLATES.values() for text in texts][:-1]
        asked = dict(zip(self.bystanders["context"].keys, self.prompts, strict=True))
        return [{key: float(text.startswith(first) and text.endswith(last))
                 for key, text in asked.items()} for first, last in every]  # fmt: skip

    def _piloted(self, name: str, hold: str, make: Callable[[], Any]) -> dict[str, float]:
        path = self.folder / f"pilot {name}.json"
        if not path.exists():
            found = {k: m.kl for k, m in self.bystanders[hold].moved(make).items()}
            path.write_text(json.dumps(found), encoding="utf-8")
        known: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return known

    @cached_property
    def parts(self) -> tuple[list[int], list[int]]:
        """One split for all methods."""
        return self.bystanders["context"].split(SHARE, SEED, self.by)

    @cached_property
    def coarse(self) -> tuple[list[int], list[int]]:
        """A few prompts of the choosing part that are like it, and one more of them."""
        first = self.parts[0]
        keys = self.bystanders["context"].keys
        columns = [[numbers[keys[index]] for index in first] for numbers in self.by]
        few, rest = draw_parts(columns, COARSE, SEED, balance=True)
        return [first[place] for place in few], [first[rest[0]]]


def pilots(lab: Lab) -> Mapping[str, tuple[str, Callable[[], Any]]]:
    """Returns what the parts are alike in: other spans, other directions, other slots.

    Each has the mechanism of some methods, and another span, direction or choice: a prompt that is
    easily moved by one steering is so by others of its kind. Strengths are such that KLs would be
    somewhere near the target.
    """
    editors, span = kv.editors, PILOT_SPAN
    noise = random_like(lab.delta, seed=100)
    every = range(1, len(lab.spec.layers))

    def in_cache(values: float) -> Callable[[], Any]:
        drawn = noise.only(sites="values", layers=every).operand()
        edit = editors.Steer(values=values)
        return lambda: lambda memory: edit(memory, drawn)

    def hook(site: str, layers: Sequence[int], strength: float) -> Callable[[], Any]:
        return lambda: steered(lab.model, noise.only(sites=site, layers=layers), strength)

    return {
        "boost": ("context", lambda: editors.Boost(span, math.exp(1.9), phase="decode")),
        "scale keys": ("context", lambda: editors.ScaleKeys(span, factor=1.35)),
        "scale values": ("context", lambda: editors.ScaleValues(span, factor=3.0)),
        "random keep": ("context", lambda: editors.RandomKeep(0.6, sinks=4, seed=100)),
        "values": ("prompt", in_cache(7.0)),
        "residual": ("context", hook("residual", [14], 2.5)),
        "attention": ("context", hook("attention", [14], 3.0)),
    }
