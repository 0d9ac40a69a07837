"""AttentionMatching: fewer slots that give the same attention, fitted in closed form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvedit.editors.base import Editor, Reader
from kvedit.editors.matching.options import check_numbers, frozen_options
from kvedit.editors.matching.policy import match_memory
from kvedit.editors.matching.report import MatchingReport
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Lineage
from kvedit.memory.lineage import Reproducibility

__all__ = ["AttentionMatching"]


@dataclass(frozen=True)
class AttentionMatching(Editor):
    """Replaces the slots of each KV head by fewer, with the same local output and mass.

    Zweiger, Fu, Guo and Kim 2026 (*Fast KV Compaction via Attention Matching*, arXiv 2602.16284):
    keys are a subset of the head's own; a bias for each, the log of the mass that it stands for,
    is fitted by non-negative least squares; values are fitted by least squares. No gradients. What
    the result is matched for are reference queries, by default those of a model that repeats the
    context. See ``docs/matching.md`` for the algorithm, and for what is decided here.

    Layers with a window are left alone. Kept slots are packed: source -1, nominal positions,
    ``next_position`` as it was. A bias that the memory has is part of the logits, and stays on the
    slots that are kept.

    Args:
        budget: slots per KV head: a whole number, or a share in (0, 1].
        keys: how keys are chosen: ``"attention"`` (most attention), ``"omp"`` (matching pursuit of
            the mass), ``"omp_fast"`` and ``"omp_progressive"`` (the same, several keys a round),
            ``"random"``, ``"first"``.
        score: for ``"attention"``: ``"rms"``, ``"max"`` or ``"mean"`` over queries.
        pooling: odd number of neighbours that a slot's score is averaged over, or None.
        bias: whether a bias is fitted.
        values: whether values are fitted.
        bias_range: lowest and highest fitted bias, in nats.
        solver: ``"nnls"``: the least squares under these bounds, exactly. ``"clamp"``: free least
            squares, clamped, then ``steps`` projected-gradient steps, as in the published code.
        steps: see ``solver``.
        refine: keys whose bias is at or below this are dropped, and others chosen instead; None
            for no such thing. The paper's is -7, with matching pursuit.
        queries: ``"repeat"``, ``"self_study"``, ``"self_study+repeat"`` (prompts answered by the
            model, :data:`~kvedit.editors.matching.study.STUDY`), or a list of prompts: the queries
            of a model that reads these over the memory; ``"context"``: the context's own;
            ``"calibrated"``: an operand of :func:`kvedit.calibrate`; ``"random"``: a control.
        answer_tokens: tokens of a prompt's greedy answer at most; 0 reads the prompt alone.
        max_queries: vectors that a KV head is fitted on at most, a seeded choice; None for all.
        on_policy: whether later layers are matched for queries over earlier layers as matched.
        layers_per_pass: layers that are matched per on-policy pass; 0 matches all in one.
        sinks: first slots that are kept as they are.
        recent: last slots that are kept as they are.
        allocate: ``"uniform"``; heads of all layers compete for the slots by the attention that
            these get, ``"peak"`` by the most that any query pays, ``"mass"`` by the mean; or
            weights ``{layer: [weight of each KV head]}``.
        ridge: of the values' fit, as a share of the mean eigenvalue, or ``"auto"``.
        chunk: slots that are fitted at once; None for all. The budget is spread over chunks.
        fold_bias: whether values are fitted for no bias at all, so that any engine can serve the
            result. A bias that the memory had is folded into the values, too.
        layers: layers to match; None means all with full attention.
        seed: of random choices.

    Raises:
        InvalidArgument: if a parameter is out of range, or parameters contradict each other.
        UnsupportedModel: if a named layer has a window.
    """

    rewrites: ClassVar[bool] = True

    budget: int | float
    keys: Literal["attention", "omp", "omp_fast", "omp_progressive", "random", "first"] = (
        "attention"
    )
    score: Literal["rms", "max", "mean"] = "rms"
    pooling: int | None = None
    bias: bool = True
    values: bool = True
    bias_range: tuple[float, float] = (-7.0, 7.0)
    solver: Literal["nnls", "clamp"] = "nnls"
    steps: int = 2
    refine: float | None = None
    queries: str | tuple[str, ...] = "repeat"
    answer_tokens: int = 64
    max_queries: int | None = 8192
    on_policy: bool = False
    layers_per_pass: int = 0
    sinks: int = 0
    recent: int = 0
    allocate: Any = "uniform"
    ridge: Literal["auto"] | float = "auto"
    chunk: int | None = None
    fold_bias: bool = False
    layers: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks names and ranges, and makes everything hashable."""
        for name, value in frozen_options(self).items():
            object.__setattr__(self, name, value)
        check_numbers(self)

    @property
    def operands(self) -> tuple[str, ...]:  # type: ignore[override]
        """A calibration's queries, where it is matched for these."""
        return ("queries",) if self.queries == "calibrated" else ()

    @property
    def reproducibility(self) -> Reproducibility:  # type: ignore[override]
        """``"reader"``, unless the queries come from no model."""
        return "pure" if self.queries in ("calibrated", "random") else "reader"

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the matched memory."""
        return self._match(memories, reader)[0]

    def match(
        self, *memories: KVMemory, reader: Reader | None = None
    ) -> tuple[KVMemory, MatchingReport]:
        """Returns the same memory as a call does, and how well it is matched.

        Args:
            *memories: the memory, and the operand for ``queries="calibrated"``.
            reader: the model.
        """
        self.check_inputs(memories)
        for memory in memories:
            memory.check_unmodified()
        edited, report = self._match(memories, reader)
        lineage = Lineage.join([memory.lineage for memory in memories], self._node(memories))
        return dataclasses.replace(edited, lineage=lineage), report

    def _match(
        self, memories: tuple[KVMemory, ...], reader: Reader | None
    ) -> tuple[KVMemory, MatchingReport]:
        memory, operand = memories[0], memories[1] if len(memories) > 1 else None
        if memory.rules:
            raise InvalidArgument(
                "this memory has run-time rules, whose spans would not find packed slots: match it "
                "before rules are added, or resolve them into bias"
            )
        edited, heads, held = match_memory(memory, self, reader=reader, operand=operand)
        return edited, MatchingReport(tuple(heads), held)
