"""Method and Baselines: the rows of a comparison, those that must always be in it included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvedit.errors import InvalidArgument
from kvedit.evals.steering.asker import Transform
from kvedit.evals.steering.directions import random_like
from kvedit.evals.steering.entering import Apply, Steering
from kvedit.evals.steering.talking import with_examples, with_instruction
from kvedit.memory import Delta

__all__ = ["Baselines", "Method"]


@dataclass(frozen=True, eq=False)
class Method:
    """One row: what steers, how strongly, and what the prompt says besides.

    Args:
        apply: from a strength to what steers; None for no steering.
        strength: the strength.
        transform: what is done to prompts; None leaves them.
        identity: what tells this method from another of the same name in a journal, such as a
            delta's digest.

    Raises:
        InvalidArgument: if something is applied without a strength.
    """

    apply: Apply | None = None
    strength: float | None = None
    transform: Transform | None = None
    identity: str = ""

    def __post_init__(self) -> None:
        """Checks that there is a strength."""
        if self.apply is not None and self.strength is None:
            raise InvalidArgument("a method that steers needs its strength")

    def make(self) -> Steering | None:
        """Returns what steers, a new one at each call; None if nothing does."""
        if self.apply is None or self.strength is None:
            return None
        return self.apply(self.strength)


@dataclass(frozen=True, eq=False)
class Baselines:
    """What steering is compared with: nothing, other directions, and saying it.

    Args:
        instruction: says in words what steering is to do, such as "Think step by step."
        examples: question and answer in the wanted style, for few-shot prompts.
        random: random directions of equal norm, by name, at the strengths of what they control.

    Raises:
        InvalidArgument: if one of them is missing: a table without them can't tell whether the
            direction matters, or whether steering is worth it.
    """

    instruction: str
    examples: tuple[tuple[str, str], ...]
    random: Mapping[str, Method]

    def __post_init__(self) -> None:
        """Checks that nothing is missing."""
        if not self.random:
            raise InvalidArgument(
                "expected random directions of equal norm, found none: Baselines.of draws them"
            )
        with_instruction(self.instruction)
        with_examples(self.examples)

    @classmethod
    def of(
        cls,
        apply: Callable[[Delta, float], Steering],
        delta: Delta,
        strengths: float | Sequence[float],
        *,
        instruction: str,
        examples: Sequence[tuple[str, str]],
        seeds: Sequence[int] = (0,),
    ) -> Baselines:
        """Returns baselines with random directions of a delta's norms.

        Args:
            apply: from a delta and a strength to what steers.
            delta: whose norms they have.
            strengths: strengths at which they are applied.
            instruction: see above.
            examples: see above.
            seeds: a random direction each.
        """
        many = [strengths] if isinstance(strengths, int | float) else list(strengths)
        random = {}
        for seed in seeds:
            other = random_like(delta, seed)
            for strength in many:
                name = f"random {seed}" + (f" at {strength:g}" if len(many) > 1 else "")
                random[name] = Method(_bound(apply, other), float(strength), None, other.digest)
        return cls(instruction, tuple(tuple(pair) for pair in examples), random)  # type: ignore[misc]

    def methods(self) -> dict[str, Method]:
        """Returns the rows: ``"none"``, ``"prompt"``, ``"few-shot"``, and the random ones."""
        return {
            "none": Method(),
            "prompt": Method(
                transform=with_instruction(self.instruction), identity=self.instruction
            ),
            "few-shot": Method(
                transform=with_examples(self.examples), identity=repr(self.examples)
            ),
            **self.random,
        }


def _bound(apply: Callable[[Delta, float], Steering], delta: Delta) -> Apply:
    return lambda strength: apply(delta, strength)
