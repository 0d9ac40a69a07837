"""Ways to steer: the ``steering`` section of a config, into a cache or while the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvedit.editors.steering import Steer
from kvedit.editors.target import as_indices, as_number
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.memory import Delta, KVMemory
from kvedit.runs.targets import fill
from kvedit.steering.continuous import steered
from kvedit.steering.operators import OPERATORS
from kvedit.steering.scopes import Last, Positions, Scope, as_scope

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvedit.evals.steering import Steering
    from kvedit.steering.conditions import Rule

__all__ = ["WAYS", "Cache", "Continuous", "Way", "read_way"]


@dataclass(frozen=True)
class Way:
    """What both ways have: layers, and how strong.

    Args:
        layers: layers, negative from the end; None is all that the delta has.
        preserve_norm: whether what is changed keeps its length.
        offset: what is read between prompt and answer.
        strength: with sign; None finds it.
        target_kl: KL on unrelated prompts at which it is found, nats per token.
        bracket: first and last strength of the search.

    Raises:
        InvalidArgument: if a value can't be used, or strength and target are both there or neither.
    """

    hold: ClassVar[Literal["context", "prompt"]]
    sites: ClassVar[tuple[str, ...]]

    layers: Any = None
    preserve_norm: bool = False
    offset: str = ""
    strength: float | None = None
    target_kl: float | None = None
    bracket: Any = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the values."""
        object.__setattr__(self, "layers", as_indices("steering.layers", self.layers))
        if (self.strength is None) == (self.target_kl is None):
            raise InvalidArgument(
                "steering: give a strength, or a target_kl at which it is found, and leave the "
                f"other null; found {self.strength!r} and {self.target_kl!r}"
            )
        if self.strength is not None:
            as_number("steering.strength", self.strength)
        elif self.target_kl is None or not as_number("steering.target_kl", self.target_kl) > 0:
            raise InvalidArgument(f"steering.target_kl: expected above 0, found {self.target_kl!r}")
        ends = self.bracket
        if not isinstance(ends, Sequence) or isinstance(ends, str) or len(ends) != 2:
            raise InvalidArgument(f"steering.bracket: expected two numbers, found {ends!r}")
        pair = tuple(as_number("steering.bracket", end) for end in ends)
        object.__setattr__(self, "bracket", pair)

    @property
    def used(self) -> tuple[str, ...]:
        """Sites that it can't do without."""
        return ()

    def check_sites(self, sites: Sequence[str]) -> None:
        """Raises InvalidArgument if a delta of these sites is nothing that it steers with."""
        missing = [site for site in self.used if site not in sites]
        if missing or not set(sites) & set(self.sites):
            raise InvalidArgument(
                f"this steering adds {' and '.join(self.used or self.sites)}, and the delta has "
                f"{', '.join(sites)}: choose extract=keys_values for steering=cache, "
                "extract=residual for steering=continuous"
            )

    def part(self, delta: Delta) -> Delta:
        """Returns what of a delta it steers with."""
        self.check_sites(delta.sites)
        sites = self.used or tuple(site for site in delta.sites if site in self.sites)
        return delta.only(sites=sites, layers=self.layers)


@dataclass(frozen=True)
class Cache(Way):
    """Keys and values, added once to the slot of the prompt's last token.

    Args:
        keys: factor of keys, times the strength; 0 leaves keys alone.
        values: factor of values.
    """

    hold: ClassVar[Literal["context", "prompt"]] = "prompt"
    sites: ClassVar[tuple[str, ...]] = ("keys", "values")

    offset: str = "\n"
    keys: float = 0.0
    values: float = 1.0

    def __post_init__(self) -> None:
        """Checks that something is added."""
        super().__post_init__()
        for name in self.sites:
            as_number(f"steering.{name}", getattr(self, name))
        if not self.used:
            raise InvalidArgument("steering: keys and values are both 0, so nothing is added")
        if not self.offset:
            raise InvalidArgument(
                "steering.offset: a token must be read behind the prompt to see its last slot, for "
                'example "\\n"; found none'
            )

    @property
    def used(self) -> tuple[str, ...]:
        """Sites with a factor other than 0."""
        return tuple(site for site in self.sites if getattr(self, site))

    def editor(self, strength: float) -> Steer:
        """Returns the editor at a strength."""
        return Steer(
            keys=strength * self.keys,
            values=strength * self.values,
            preserve_norm=self.preserve_norm,
        )

    def steering(self, model: PreTrainedModel, part: Delta, strength: float) -> Steering:
        """Returns the edit of a prompt's memory."""
        return partial(_edited, self.editor(strength), part.operand())


@dataclass(frozen=True)
class Continuous(Way):
    """Residual and attention vectors, added while the model runs.

    Args:
        scope: which tokens: a name, ``{last: k}``, ``{positions: [a, b]}``, or a list of these.
        operator: add, ablate or ablate_add.
    """

    hold: ClassVar[Literal["context", "prompt"]] = "context"
    sites: ClassVar[tuple[str, ...]] = ("residual", "attention")

    scope: Any = "generation"
    operator: str = "add"

    def __post_init__(self) -> None:
        """Checks scope and operator."""
        super().__post_init__()
        _scope(self.scope)
        if self.operator not in OPERATORS:
            raise UnknownName("steering operator", str(self.operator), OPERATORS)

    def steering(
        self, model: PreTrainedModel, part: Delta, strength: float, condition: Rule | None = None
    ) -> Steering:
        """Returns a context manager, which steers one block."""
        return steered(
            model, part, strength, scope=_scope(self.scope), preserve_norm=self.preserve_norm,
            operator=self.operator, condition=condition,  # type: ignore[arg-type]
        )  # fmt: skip


def _edited(editor: Steer, operand: KVMemory, memory: KVMemory) -> KVMemory:
    made: KVMemory = editor(memory, operand)
    return made


def _scope(value: Any) -> Scope:
    if isinstance(value, list | tuple) and value:
        first, *rest = map(_scope, value)
        for other in rest:
            first = first | other
        return first
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, given),) = value.items()
        if name == "last":
            return Last(given)
        if name == "positions" and isinstance(given, list | tuple) and len(given) == 2:
            return Positions(*given)
    if isinstance(value, str):
        return as_scope(value)
    raise InvalidArgument(
        "steering.scope: expected all, prompt, generation, {last: 1}, {positions: [0, 8]} or a "
        f"list of these, found {value!r}"
    )


WAYS: Mapping[str, type[Way]] = {"cache": Cache, "continuous": Continuous}
"""Name of a way to its class."""


def read_way(section: Any) -> Any:
    """Returns a checked ``steering`` section: a :class:`Cache` or :class:`Continuous`.

    Raises:
        InvalidArgument: if a value can't be used.
        UnknownName: if a way or a key does not exist.
    """
    if not isinstance(section, Mapping) or "steering" not in section:
        raise InvalidArgument(
            f"steering: expected keys and values with steering ({', '.join(WAYS)}), found "
            f"{section!r}"
        )
    values = dict(section)
    name = values.pop("steering")
    if name not in WAYS:
        raise UnknownName("way to steer", str(name), WAYS)
    return fill("steering", WAYS[name], values)
