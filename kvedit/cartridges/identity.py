"""Identity of a training run: what it was given, as digests. Lineage and checkpoints carry it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from blake3 import blake3

from kvedit.cartridges.plan import TrainPlan
from kvedit.cartridges.sample import Sample
from kvedit.memory import KVMemory, Lineage, LineageNode, ModelSpec
from kvedit.memory.digest import canonical_json, digest_tensor
from kvedit.memory.lineage import environment

__all__ = ["run_identity", "samples_digest", "trained_lineage"]


def samples_digest(samples: Iterable[Sample]) -> str:
    """Returns the digest of samples in their order: tokens and teacher, not the texts."""
    hasher = blake3()
    for sample in samples:
        parts = (sample.tokens, sample.top_ids, sample.top_logprobs, sample.tail)
        line = [sample.key, sample.start, *map(digest_tensor, parts)]
        hasher.update(canonical_json(line) + b"\n")
    return hasher.hexdigest()


def run_identity(
    spec: ModelSpec,
    start: KVMemory,
    samples: Sequence[Sample],
    plan: TrainPlan,
    held_out: Sequence[Sample],
    others: Sequence[KVMemory],
    teacher: KVMemory | None,
) -> dict[str, Any]:
    """Returns what tells a run from another one, as plain data."""
    prints = spec.fingerprint
    return {
        "model": {"config": prints.config, "weights": prints.weights, "adapters": prints.adapters},
        "start": start.digest,
        "samples": samples_digest(samples),
        "held_out": samples_digest(held_out) if held_out else None,
        "distractors": [memory.digest for memory in others],
        "teacher": None if teacher is None else teacher.digest,
        "plan": plan.meaning(),
    }


def trained_lineage(
    identity: dict[str, Any], inputs: Sequence[KVMemory], plan: TrainPlan, steps: int
) -> Lineage:
    """Returns the lineage of a trained memory.

    Args:
        identity: of the run.
        inputs: the start, then distractors, then the teacher.
        plan: the plan.
        steps: after how many steps the result was taken.
    """
    node = LineageNode(
        operation="train",
        name="train",
        version=1,
        parameters=canonical_json({**identity, "steps": steps}).decode(),
        # A memory without history is named by what is in it.
        inputs=tuple(m.lineage.head.id if m.lineage.head else m.digest for m in inputs),
        reproducibility="trained",
        seed=plan.seed,
        environment=environment(inputs[0].dtype),
    )
    return Lineage.join([memory.lineage for memory in inputs], node)
