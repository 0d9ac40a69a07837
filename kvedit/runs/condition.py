"""Condition: the ``condition`` section of a config, how one is found, and whether it is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.steering import Asker, unrelated_prompts
from kvedit.evals.steering.asker import Place
from kvedit.memory import Delta
from kvedit.runs.steps import Loaded
from kvedit.runs.styling import Style
from kvedit.runs.targets import fill
from kvedit.runtime.attaching import open_session
from kvedit.runtime.tapping import tap
from kvedit.steering.conditions import Condition, read_states
from kvedit.steering.contrast import Contrast
from kvedit.steering.estimators import Estimator
from kvedit.steering.extracting import delta_of
from kvedit.steering.questions import arithmetic_questions
from kvedit.steering.reading import read_contrast
from kvedit.steering.searching import FoundCondition, find_condition

__all__ = ["Labelled", "met", "read_labelled", "similarities"]


@dataclass(frozen=True)
class Labelled:
    """Prompts by which a condition is found, none of which is asked later.

    Args:
        met: prompts that shall meet it.
        unmet: prompts that shall not.
        layers: layers to try; None is all before those that are steered.
        read: of the prompt's hidden states: their mean, or the last.
        estimator: of the condition vector.
    """

    met: tuple[str, ...]
    unmet: tuple[str, ...]
    layers: tuple[int, ...] | None
    read: Literal["mean", "last"]
    estimator: Any

    def find(self, loaded: Loaded, asker: Asker, steered: Delta) -> FoundCondition:
        """Returns the condition with the best F1 on the prompts.

        Args:
            loaded: the model.
            asker: how prompts are put.
            steered: what will be steered, which must come after the decision.
        """
        first = min(steered.layers)
        if "residual" not in steered.sites:
            first -= 1  # attention's output of a layer comes before the block's
        layers = range(first + 1) if self.layers is None else self.layers
        turns = [[asker.as_turns(text) for text in kind] for kind in (self.met, self.unmet)]
        # Sides of a pair have nothing to do with each other: all that counts are their kinds.
        pairs = min(map(len, turns))
        readings = read_contrast(
            loaded.model, loaded.tokenizer,
            Contrast.of(list(zip(turns[0][:pairs], turns[1][:pairs], strict=True)), "condition"),
            sites="residual", layers=layers, read=self.read, batch=asker.batch_size,
        )  # fmt: skip
        labelled = [(turn, True) for turn in turns[0]] + [(turn, False) for turn in turns[1]]
        return find_condition(
            loaded.model, loaded.tokenizer, delta_of(readings, self.estimator), labelled,
            read=self.read, batch=asker.batch_size,
        )  # fmt: skip


def read_labelled(section: Any, style: Style) -> Labelled:
    """Returns a checked ``condition`` section.

    Args:
        section: the section.
        style: what is asked later; drawn prompts are others.

    Raises:
        InvalidArgument: if a value can't be used, or a prompt is asked later as well.
    """
    return fill("condition", _labelled, section, style)


def _labelled(
    style: Style,
    met: Any = 16,
    unmet: Any = 16,
    seed: int = 1,
    layers: Any = None,
    read: str = "mean",
    estimator: Any = "pca",
) -> Labelled:
    asked = {question.prompt for question in style.questions} | set(style.bystanders)
    if read not in ("mean", "last"):
        raise InvalidArgument(f"condition.read: expected mean or last, found {read!r}")
    Estimator.of(estimator)
    kinds = {}
    for name, given in (("met", met), ("unmet", unmet)):
        drawn = _sums if name == "met" else _unrelated
        if isinstance(given, int) and not isinstance(given, bool) and given > 0:
            kinds[name] = drawn(given, seed, asked)
        elif isinstance(given, list | tuple) and given and all(isinstance(t, str) for t in given):
            kinds[name] = tuple(given)
        else:
            raise InvalidArgument(
                f"condition.{name}: expected a list of prompts, or a number of drawn ones, found "
                f"{given!r}"
            )
    both = [text for kind in kinds.values() for text in kind]
    if len(set(both)) < len(both) or set(both) & asked:
        raise InvalidArgument(
            "condition: its prompts must differ from each other and from those that are asked "
            "later, or how often it is met would be told of the prompts that it was found on"
        )
    chosen = None if layers is None else tuple(layers)
    return Labelled(kinds["met"], kinds["unmet"], chosen, read, estimator)  # type: ignore[arg-type]


def _sums(count: int, seed: int, asked: set[str]) -> tuple[str, ...]:
    return tuple(one.question for one in arithmetic_questions(count, seed))


def _unrelated(count: int, seed: int, asked: set[str]) -> tuple[str, ...]:
    drawn = unrelated_prompts(count + len(asked), seed)
    return tuple(text for text in drawn if text not in asked)[:count]


def similarities(asker: Asker, condition: Condition, places: Sequence[Place]) -> list[float]:
    """Returns each prompt's likeness to the condition vector, in [-1, 1], read one by one."""
    found = []
    for place in places:
        ids = torch.tensor([place.ids])
        with (
            open_session(
                asker.model, asker.inspection, [place.memory], asker.tokenizer, asker.strict
            ) as session,
            tap(asker.model, ("hidden",), [condition.layer]) as seen,
        ):
            session.forward(ids, keep=1)
        states = read_states(seen["hidden", condition.layer], torch.ones_like(ids).bool())
        found.append(float(condition.similarity(states.state(condition.read))[0]))
    return found


def met(condition: Condition, similarity: float) -> bool:
    """Whether a prompt of that likeness meets a condition."""
    return bool(condition.met({condition: torch.tensor([similarity])})[0])
