"""What is fixed before the runs: markers, caps, sizes, strengths; and what a seed draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import kvedit as kv
from kvedit.evals import unrelated_prompts
from kvedit.evals.recall import RecallQuestion
from kvedit.evals.steering import STEP_BY_STEP, Asker, Bystanders, Markers, word_problems
from kvedit.evals.steering.asker import Place, Prompt
from kvedit.steering import Last, few_shot_reasoning, steered
from kvedit.steering.questions import arithmetic_questions

PAIRS, SHOTS = 16, 3
ANSWER_TOKENS = 40
PILOT = 100
"""Seed of the pilot: none of its questions, pairs or bystanders is drawn for the report."""
INSTRUCTION = "Think step by step."

# Written down after the pilot (seed 100: 16 questions, 8 bystanders) and before seeds 0, 1 and 2.
LEAST = 1
"""Patterns that an answer must hold. Unsteered pilot answers: 3 of 16 held one, none held two. Two
would be the cleaner bar, but in 40 tokens no answer that was steered in the cache reached a second
one either (0 of 16 at every strength), so one it is, with 15 % for no steering in doubt from the
start. How many hold two, and how many begin with the style, is reported beside it."""

STEERED_AT_LEAST, OTHERS_AT_MOST = 0.75, 0.15
"""Marker rates: of values in the cache; of no steering and of random directions."""

KL_AT_MOST = 1.0
"""KL(base‖steered) on unrelated prompts, nats per token of 16."""
REPEAT_ABOVE_NONE = 0.05
"""Longest repeat, as a share of the answer, above that without steering."""
ACCURACY_BELOW_NONE = 0.10
"""Share of right answers below that without steering. The pilot had 1 right of 16: near the floor,
so this cap can hardly be broken."""

# By one rule: of what the pilot tried with a KL of at most 1.0, the highest log P of "First".
C_V = 6.0
LAYER, RESIDUAL = 16, 2.0
# Keys, beside values too weak to mark most answers (pilot: 5 of 16), so that there is room to gain.
C_V_SMALL, C_K = 3.0, 1.0
QUESTIONS, KEY_QUESTIONS, BYSTANDERS = 50, 30, 12


class Kept(Asker):
    """An asker that reads a prompt once for all methods, and shared turns before it once, too."""

    def places(self, prompts: Sequence[Prompt]) -> list[Place]:
        """Returns where answers begin."""
        known: dict[str, Place] = self.__dict__.setdefault("_known", {})
        turns: list[Any] = [self.as_turns(prompt) for prompt in prompts]
        missing = [turn for turn in turns if repr(turn) not in known]
        if missing and len(missing[0]) > 1:  # examples, the same before every question
            made = self._behind(missing[0][:-1]).places([turn[-1:] for turn in missing])
        else:
            made = super().places(missing) if missing else []
        found = dict(zip(map(repr, missing), made, strict=True))
        # Prompts with examples are long, and one method asks them.
        known.update({name: place for name, place in found.items() if len(turns[0]) == 1})
        return [found[repr(turn)] if repr(turn) in found else known[repr(turn)] for turn in turns]

    def _behind(self, before: Any) -> Kept:
        memories: dict[str, Kept] = self.__dict__.setdefault("_before", {})
        if repr(before) not in memories:
            memory = kv.capture(self.model, self.tokenizer, before)
            memories[repr(before)] = replace(self, context=memory)
        return memories[repr(before)]


class Draw:
    """One seed: its pairs, questions, bystanders and random directions."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path, seed: int, questions: int,
                 bystanders: int, pairs: int = PAIRS) -> None:  # fmt: skip
        """Draws everything; reads nothing yet."""
        self.model, self.tokenizer, self.folder, self.seed = model, tokenizer, folder, seed
        self.contrast = few_shot_reasoning(pairs=pairs, shots=SHOTS, seed=seed)
        # A pilot question that was drawn again by a seed would not be held out: it is passed over.
        pilot = {q.prompt for q in word_problems(60, PILOT)} if seed != PILOT else set()
        drawn = [q for q in word_problems(questions + 20, seed) if q.prompt not in pilot]
        self.questions: list[RecallQuestion] = drawn[:questions]
        self.asker = asker(model, tokenizer, ANSWER_TOKENS)
        prompts = [p for p in unrelated_prompts(bystanders + 20, seed)
                   if seed == PILOT or p not in unrelated_prompts(40, PILOT)]  # fmt: skip
        self.bystanders = Bystanders(asker(model, tokenizer, 16), prompts[:bystanders])
        self.examples = [(q.question, f"{q.reasoning}\nAnswer: {q.answer}")
                         for q in arithmetic_questions(SHOTS, seed)]  # fmt: skip


OPENS = Markers(
    "opens step by step",
    (r"\A\W*(?:first|firstly|to begin|to start|step\s*(?:1|one))\b",),
    opening="First",
)
"""The second protocol's marker: the answer *begins* in the style. Chosen in sight of the first
protocol's answers (82 % with values, none without and none with random directions), so it stands
on seeds that the first one had not drawn."""


def asker(model: Any, tokenizer: Any, tokens: int) -> Asker:
    """Returns how everything is asked: the prompt is in memory, a line break is read behind it."""
    return Kept(model, tokenizer, hold="prompt", offset="\n", chat=True, max_new_tokens=tokens,
                batch_size=25)  # fmt: skip


def in_cache(delta: kv.Delta, values: float, keys: float = 0.0) -> Callable[..., kv.KVMemory]:
    """Returns the edit of the last prompt slot, in all layers but the first, as in the paper."""
    layers = tuple(range(1, len(delta.model.layers)))
    edit = kv.editors.Steer(values=values, keys=keys, layers=layers)
    operand = delta.operand()
    return lambda memory: edit(memory, operand)


def in_layers(delta: kv.Delta, layers: Iterable[int], values: float = 1.0, keys: float = 0.0
              ) -> Callable[[float], Callable[..., kv.KVMemory]]:  # fmt: skip
    """Returns, by strength, the edit of the last prompt slot in given layers: shares of c each."""
    operand, chosen = delta.operand(), tuple(layers)

    def at(c: float) -> Callable[..., kv.KVMemory]:
        edit = kv.editors.Steer(values=values * c, keys=keys * c, layers=chosen)
        return lambda memory: edit(memory, operand)

    return at


def on_from_offset(model: Any, delta: kv.Delta, site: str, layers: Iterable[int]
                   ) -> Callable[[float], Any]:  # fmt: skip
    """Returns, by strength, hooks from the offset token on: on what would see an edit in cache."""
    # The scope "generation" alone begins with the first chosen token, whose own choice, the
    # style's opening, it does not touch.
    part = delta.only(sites=site, layers=list(layers))
    return lambda c: steered(model, part, c, scope=Last(1) | "generation")


def markers(least: int) -> Any:
    """Returns the library's markers for the style, with the number that an answer must hold."""
    return replace(STEP_BY_STEP, least=least)
