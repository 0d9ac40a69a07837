"""TrainPlan: everything that a training run is told, as plain frozen data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kvedit.cartridges.freezing import Freeze
from kvedit.cartridges.mappings import known_keys
from kvedit.cartridges.objective import Objective
from kvedit.cartridges.schedule import SCHEDULES, Schedule
from kvedit.errors import InvalidArgument

__all__ = ["TrainPlan"]

_FREE = ("checkpoint_every", "keep", "rows", "recompute", "drift_every")
"""Fields that change where and how a run computes, and not what: a resumed run may change them."""


@dataclass(frozen=True)
class TrainPlan:
    """How to train. Equal plans, starts and samples give equal cartridges.

    Defaults follow the published code of Cartridges (Adam at 2e-2 without decay, the first slot
    frozen), but for the loss, which has a tail term and is averaged per token.

    Args:
        epochs: passes over all samples; None with ``steps`` None means one.
        steps: optimizer steps in place of epochs.
        lr: peak learning rate.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"`` after the warm-up.
        warmup: steps of linear warm-up.
        final: fraction of ``lr`` in the last step of a falling schedule.
        betas: Adam's decay rates.
        epsilon: Adam's epsilon.
        clip: largest norm of the gradient, or None.
        pack: tokens of a packed row. A longer sample gets a row of its own.
        packs: rows per step, over all processes. More rows than fit a pass are accumulated.
        rows: rows per forward pass and process; more take more memory and give the same.
        seed: of the order of samples and of distractors.
        precision: ``"model"`` computes in the model's dtype, ``"bf16"`` under autocast.
        masters: dtype of the parameters: ``"float32"`` (or wider, if the memory is), ``"memory"``.
        freeze: what stays.
        objective: weights of the losses.
        distractors: fraction of the steps in which other memories stand beside the target.
        max_distractors: how many of them at most; their number is drawn evenly from 1.
        rotate: whether distractors stand behind each other by RoPE, as
            :class:`~kvedit.editors.concat.Concat` places them, or all at their own positions.
        eval_every: steps between evaluations on held-out samples; None: only first and last.
        patience: evaluations without a lower held-out loss after which training ends, or None.
        best: whether the result is that of the best evaluation, if there are held-out samples.
        checkpoint_every: steps between checkpoints; None: only at the end.
        keep: how many checkpoints are kept.
        recompute: whether blocks are computed again in backward, to save memory.
        drift_every: steps between logs of how far keys and values have moved.

    Raises:
        InvalidArgument: if a number is out of range.
    """

    epochs: int | None = None
    steps: int | None = None
    lr: float = 2e-2
    schedule: Schedule = "constant"
    warmup: int = 0
    final: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip: float | None = None
    pack: int = 512
    packs: int = 1
    rows: int = 1
    seed: int = 0
    precision: Literal["model", "bf16"] = "model"
    masters: Literal["float32", "memory"] = "float32"
    freeze: Freeze = field(default_factory=Freeze)
    objective: Objective = field(default_factory=Objective)
    distractors: float = 0.0
    max_distractors: int = 1
    rotate: bool = True
    eval_every: int | None = None
    patience: int | None = None
    best: bool = True
    checkpoint_every: int | None = None
    keep: int = 2
    recompute: bool = False
    drift_every: int = 10

    def __post_init__(self) -> None:
        """Checks ranges; mappings become what they describe."""
        object.__setattr__(self, "freeze", Freeze.of(self.freeze))
        object.__setattr__(self, "objective", Objective.of(self.objective))
        object.__setattr__(self, "betas", tuple(self.betas))
        counts = ("pack", "packs", "rows", "max_distractors", "keep", "drift_every")
        optional = ("epochs", "steps", "eval_every", "patience", "checkpoint_every")
        self._whole((*counts, *(name for name in optional if getattr(self, name) is not None)), 1)
        self._whole(("warmup",), 0)
        if self.epochs is not None and self.steps is not None:
            raise InvalidArgument("give epochs or steps, not both")
        self._check_floats()
        if self.patience is not None and self.eval_every is None:
            raise InvalidArgument("patience counts evaluations: give eval_every as well")

    def _whole(self, names: tuple[str, ...], least: int) -> None:
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InvalidArgument(
                    f"{name}: expected a whole number from {least}, found {value!r}"
                )

    def _check_floats(self) -> None:
        ranges: dict[str, tuple[Any, bool]] = {
            "lr": ("a finite number above 0", _above(self.lr) and math.isfinite(self.lr)),
            "clip": ("a number above 0, or None", self.clip is None or _above(self.clip)),
            "epsilon": ("a number above 0", _above(self.epsilon)),
            "final": ("a number from 0 to 1", _share(self.final)),
            "distractors": ("a number from 0 to 1", _share(self.distractors)),
            "betas": (
                "two numbers from 0 below 1",
                [_share(b) and b < 1 for b in self.betas] == [True] * 2,
            ),
            "schedule": (", ".join(SCHEDULES), self.schedule in SCHEDULES),
            "precision": ("model, bf16", self.precision in ("model", "bf16")),
            "masters": ("float32, memory", self.masters in ("float32", "memory")),
        }  # fmt: skip
        for name, (wanted, good) in ranges.items():
            if not good:
                raise InvalidArgument(f"{name}: expected {wanted}, found {getattr(self, name)!r}")

    @classmethod
    def of(cls, given: TrainPlan | Mapping[str, Any]) -> TrainPlan:
        """Returns a mapping, as a config file holds it, as a plan.

        Raises:
            InvalidArgument: if it is no mapping, names what a plan does not have, or a value is out
                of range.
        """
        if isinstance(given, TrainPlan):
            return given
        return cls(**known_keys("plan", cls, given))

    def parameters(self) -> dict[str, Any]:
        """Returns the plan as plain data; :meth:`of` reads it back."""
        return asdict(self)

    def meaning(self) -> dict[str, Any]:
        """Returns what of the plan the result depends on."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


def _above(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1
