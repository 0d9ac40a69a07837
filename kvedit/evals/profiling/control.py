"""Held-out controls: chosen heads beside random ones and beside all, and at equal collateral."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.profiling.effects import Effects, HeadScore, Interval, resample
from kvedit.evals.profiling.measuring import Setting
from kvedit.evals.profiling.probe import Probe
from kvedit.evals.profiling.profiler import measure_all
from kvedit.memory.heads import HeadSet
from kvedit.models.inspection import inspect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "STRENGTHS",
    "Contrast",
    "KLCurves",
    "RandomControl",
    "contrast",
    "kl_curves",
    "random_control",
]

STRENGTHS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
"""Nats: from hardly anything to nearly all attention."""

_SMALLEST_KL = 1e-9  # nats; zero has no logarithm


@dataclass(frozen=True)
class Contrast:
    """Chosen heads minus the mean of controls, on the same probes.

    Args:
        gain: difference of mean margins, in nats.
        gain_interval: 95 % bootstrap interval over probes and control draws.
        efficacy: difference of efficacy, in [-1, 1].
        efficacy_interval: its interval.
    """

    gain: float
    gain_interval: Interval
    efficacy: float
    efficacy_interval: Interval


@dataclass(frozen=True)
class RandomControl:
    """Chosen heads beside as many random ones, on probes that did not choose them.

    Args:
        chosen: the chosen heads.
        random: the draws.
        difference: chosen minus random.
        n: number of probes.
        seed: of draws and bootstrap.
    """

    chosen: HeadScore
    random: tuple[HeadScore, ...]
    difference: Contrast
    n: int
    seed: int


@dataclass(frozen=True)
class KLCurves:
    """What head sets cost at several strengths.

    Args:
        sets: the head sets.
        strengths: in nats, ascending.
        kl: mean KL(unsteered‖steered) of the token after unrelated prompts, in nats: for each
            set, one number per strength.
    """

    sets: tuple[HeadSet, ...]
    strengths: tuple[float, ...]
    kl: tuple[tuple[float, ...], ...]

    def at(self, kl: float) -> tuple[float | None, ...]:
        """Returns the smallest strength at which each set costs ``kl`` nats, or None.

        Between two strengths log KL is taken as linear in log strength. Measure again at the
        result, on other probes, for figures to report. None stands for a set that costs more at
        the smallest strength, or less at all of them.
        """
        return tuple(self._crossing(curve, kl) for curve in self.kl)

    def _crossing(self, curve: Sequence[float], kl: float) -> float | None:
        at = next((i for i, value in enumerate(curve) if value >= kl), 0)
        if at == 0:
            return None
        below, above = (math.log(max(value, _SMALLEST_KL)) for value in curve[at - 1 : at + 1])
        low, high = (math.log(value) for value in self.strengths[at - 1 : at + 1])
        share = (math.log(kl) - below) / (above - below)
        return math.exp(low + share * (high - low))


def random_control(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    chosen: HeadSet,
    setting: Setting,
    *,
    draws: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> RandomControl:
    """Returns how chosen heads compare with random sets of the same size and kind.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        probes: held-out cases; those that chose the heads would favour them.
        chosen: the heads.
        setting: strength, and what is read under it.
        draws: random sets; draw ``i`` has the seed ``seed + i``.
        seed: of draws and bootstrap.
        progress: whether to show a progress bar.

    Raises:
        InvalidArgument: if there are no draws.
    """
    if draws < 1:
        raise InvalidArgument(f"draws must be at least 1, found {draws}")
    spec = inspect(model, tokenizer).spec
    sets = [HeadSet.random(spec, len(chosen), seed + i, chosen.kind) for i in range(draws)]
    effects = measure_all(model, tokenizer, probes, [chosen, *sets], setting, progress=progress)
    first, *rest = effects.scores(seed)
    difference = contrast(effects, [0], list(range(1, len(sets) + 1)), seed)
    return RandomControl(first, tuple(rest), difference, len(probes), seed)


def contrast(
    effects: Effects, chosen: Sequence[int], controls: Sequence[int], seed: int
) -> Contrast:
    """Returns the mean of some sets minus the mean of others, on the same probes.

    The bootstrap draws probes, and on either side also sets, so that the interval holds the
    spread of random draws too.

    Args:
        effects: what was measured.
        chosen: columns on one side.
        controls: columns on the other.
        seed: of the bootstrap.
    """
    parts = [
        _difference(values, chosen, controls, seed)
        for values in (effects.margins, (effects.margins > 0).double())
    ]
    (gain, gain_interval), (efficacy, efficacy_interval) = parts
    return Contrast(gain, gain_interval, efficacy, efficacy_interval)


def _difference(
    values: torch.Tensor, chosen: Sequence[int], controls: Sequence[int], seed: int
) -> tuple[float, Interval]:
    sides = [values[:, list(columns)] for columns in (chosen, controls)]
    found = float(sides[0].mean() - sides[1].mean())
    if len(values) < 2:
        return found, None
    drawn = torch.Generator().manual_seed(seed)
    probes = resample(len(values), drawn)
    means = [((probes @ side) * resample(side.shape[1], drawn)).sum(dim=1) for side in sides]
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (means[0] - means[1]).quantile(bounds).tolist()
    return found, (low, high)


def kl_curves(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    sets: Sequence[HeadSet],
    setting: Setting,
    *,
    strengths: Sequence[float] = STRENGTHS,
    progress: bool = False,
) -> KLCurves:
    """Returns the collateral of head sets at several strengths, all rows of one batch.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        probes: cases, of which those with an unrelated prompt count.
        sets: the head sets.
        setting: what is read under the bias; its strength is not used.
        strengths: in nats, ascending.
        progress: whether to show a progress bar.

    Raises:
        InvalidArgument: if no probe has an unrelated prompt.
    """
    known = [probe for probe in probes if probe.unrelated is not None]
    if not known:
        raise InvalidArgument("collateral needs probes with an unrelated prompt")
    rows = [one for one in sets for _ in strengths]
    effects = measure_all(
        model, tokenizer, known, rows, setting,
        strengths=list(strengths) * len(sets), progress=progress,
    )  # fmt: skip
    curves = effects.kl.mean(dim=0).reshape(len(sets), len(strengths)).tolist()
    return KLCurves(tuple(sets), tuple(strengths), tuple(map(tuple, curves)))
