"""HeadAtlas: which heads of a model carry emphasis, with provenance, as a small JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.evals.profiling.candidates import join
from kvedit.evals.profiling.effects import HeadScore
from kvedit.memory import ModelSpec
from kvedit.memory.files import write_atomically
from kvedit.memory.heads import HeadSet, Kind

__all__ = ["HeadAtlas"]

_FORMAT = 1
_SMALLEST_KL = 1e-6  # nats; below it, KL of float32 logits is rounding


@dataclass(frozen=True)
class HeadAtlas:
    """Head sets of one model, the best first, and how they were found.

    Args:
        scores: what was tried; for ``search="greedy"``, growing sets.
        kind: query or KV heads.
        search: ``"heads"``, ``"layers"``, ``"coarse"`` or ``"greedy"``.
        strength: bias in nats under which they were tried.
        phase: who saw the bias; a head atlas is about what comes after the context, ``"decode"``.
        rerun: what was read under it, see :class:`~kvedit.evals.profiling.measuring.Setting`.
        continuation: whether whole continuations or their first tokens counted.
        n: number of probes.
        seed: of the bootstrap.
        base_margin: mean log p(wanted) - log p(rival) without steering, in nats.
        base_efficacy: fraction of probes in [0, 1] with wanted likelier, without steering.
        probes: digest of the set of probes.
        model: facts of the model, with its and the tokenizer's fingerprint.
        version: of kvedit.
        minutes: wall time of all measurements.
        task: a name for the probes; for people.

    Raises:
        InvalidArgument: if there are no scores.
    """

    scores: tuple[HeadScore, ...]
    kind: Kind
    search: str
    strength: float
    phase: str
    rerun: str
    continuation: str
    n: int
    seed: int
    base_margin: float
    base_efficacy: float
    probes: str
    model: ModelSpec
    version: str
    minutes: float
    task: str = ""

    def __post_init__(self) -> None:
        """Checks that there is something."""
        if not self.scores:
            raise InvalidArgument("a head atlas needs at least one score")

    def top(
        self,
        k: int,
        by: Literal["gain", "lower", "equal_kl"] = "gain",
        model: ModelSpec | None = None,
        strict: bool = True,
    ) -> HeadSet:
        """Returns the union of the first ``k`` sets.

        Args:
            k: how many.
            by: ``"gain"`` ranks by mean gain; ``"lower"`` by the lower end of its interval, which
                prefers what is sure; ``"equal_kl"`` by gain per root of collateral. For small
                biases gain grows as b and KL as b squared, so the last is the order that the
                sets would have at strengths of equal KL.
            model: the model that the heads are for; None leaves it unchecked.
            strict: see :meth:`check`.

        Raises:
            InvalidArgument: if there are fewer sets, or what the order needs was not measured.
            IncompatibleModel: if the model is not the atlas's.
        """
        if model is not None:
            self.check(model, strict)
        if not 1 <= k <= len(self.scores):
            raise InvalidArgument(f"this atlas holds {len(self.scores)} sets, asked for {k}")
        return join([score.heads for score in self.ordered(by)[:k]])

    def ordered(self, by: str) -> tuple[HeadScore, ...]:
        """Returns the scores in the order that :meth:`top` takes them.

        Raises:
            InvalidArgument: if what the order needs was not measured.
        """
        if by == "gain":
            return self.scores
        if by not in ("lower", "equal_kl"):
            raise InvalidArgument(f"by must be 'gain', 'lower' or 'equal_kl', found {by!r}")
        if self.search == "greedy":
            raise InvalidArgument("greedy sets are nested: they have one order, by='gain'")
        keys = [_key(score, by) for score in self.scores]
        order = sorted(range(len(keys)), key=lambda i: -keys[i])
        return tuple(self.scores[i] for i in order)

    def check(self, model: ModelSpec, strict: bool = True) -> None:
        """Raises unless the atlas's heads may be used on a model.

        Args:
            model: facts of the other model.
            strict: whether it must be the same model; False asks for the same heads per layer
                only, to carry heads from a base to its instruct model (as PASTA does from
                LLaMA-7B to Vicuna-7B).

        Raises:
            IncompatibleModel: with what differs.
        """
        mine, other = (
            [(layer.query_heads, layer.kv_heads) for layer in spec.layers]
            for spec in (self.model, model)
        )
        reasons = []
        if len(mine) != len(other):
            reasons = [f"layers: atlas {len(mine)}, model {len(other)}"]
        elif mine != other:
            at = next(i for i, pair in enumerate(mine) if pair != other[i])
            reasons = [f"layer {at} (query, KV) heads: atlas {mine[at]}, model {other[at]}"]
        elif strict:
            differ = self.model.fingerprint.differences(model.fingerprint)
            reasons = [f"{name}: atlas {a[:18]}, model {b[:18]}" for name, (a, b) in differ.items()]
        if reasons:
            hint = "; strict=False carries the heads over" if mine == other else ""
            raise IncompatibleModel(
                f"this head atlas of {self.model.name} does not fit {model.name}: "
                + "; ".join(reasons)
                + hint
            )

    def to_json(self) -> dict[str, Any]:
        """Returns plain data that :meth:`from_json` reads."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        scores = [score.to_json() for score in self.scores]
        return {"head_atlas": _FORMAT, **plain, "scores": scores, "model": self.model.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> HeadAtlas:
        """Returns the atlas that :meth:`to_json` wrote.

        Raises:
            InvalidArgument: if it is something else, or of a later format.
        """
        if not isinstance(data, dict) or data.get("head_atlas") != _FORMAT:
            found = data.get("head_atlas") if isinstance(data, dict) else type(data).__name__
            raise InvalidArgument(f"expected a head atlas of format {_FORMAT}, found {found!r}")
        parts = {key: data[key] for key in data if key != "head_atlas"}
        try:
            scores = tuple(HeadScore.from_json(one) for one in data["scores"])
            return cls(**{**parts, "scores": scores, "model": ModelSpec.from_json(data["model"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"this head atlas is damaged: {error!r}") from error

    def write(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        data = self.to_json()
        lines = [json.dumps(score, allow_nan=False) for score in data.pop("scores")]
        rest = json.dumps(data, ensure_ascii=False, allow_nan=False)
        # A score per line, for people and for diffs.
        scores = ",\n".join(lines)
        write_atomically(Path(path), f'{rest[:-1]}, "scores": [\n{scores}\n]}}\n'.encode())

    @classmethod
    def read(cls, path: str | Path) -> HeadAtlas:
        """Returns the atlas of a file.

        Raises:
            InvalidArgument: if there is none, or it can't be read.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"head atlas {path}: {error}") from error

    def __repr__(self) -> str:
        """One line, and the first sets below it."""
        head = (
            f"HeadAtlas of {self.model.name}: {len(self.scores)} sets of {self.kind} heads "
            f"({self.search}), n={self.n}, strength {self.strength:g} nats, efficacy unsteered "
            f"{self.base_efficacy:.0%}, {self.minutes:.1f} min"
        )
        return "\n".join([head, *(f"  {_shown(score)}" for score in self.scores[:5])])


def _key(score: HeadScore, by: str) -> float:
    if by == "lower":
        if score.gain_interval is None:
            raise InvalidArgument("by='lower' needs intervals, and one probe has none")
        return score.gain_interval[0]
    if score.kl is None:
        raise InvalidArgument("by='equal_kl' needs collateral: probes with an unrelated prompt")
    return score.gain / math.sqrt(max(score.kl, _SMALLEST_KL))


def _shown(score: HeadScore) -> str:
    pairs: Sequence[tuple[int, int]] = score.heads.pairs
    names = ", ".join(f"{layer}.{head}" for layer, head in pairs[:6])
    more = ", …" if len(pairs) > 6 else ""
    low, high = score.gain_interval or (score.gain, score.gain)
    cost = "" if score.kl is None else f", KL {score.kl:.3g}"
    gain = f"{score.gain:+.3f} nats ({low:+.3f} to {high:+.3f})"
    return f"{names}{more}: {gain}, efficacy {score.efficacy:.0%}{cost}"
