"""Head sets out of several tasks' atlases, as PASTA combines them (arXiv 2311.02262, section 3.2).

Task-specific is ``atlas.top(k)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals.profiling.atlas import HeadAtlas
from kvedit.evals.profiling.candidates import join
from kvedit.memory.heads import HeadSet

__all__ = ["intersection", "task_agnostic", "union"]


def intersection(atlases: Sequence[HeadAtlas], k: int, strict: bool = True) -> HeadSet:
    """Returns the heads that are among the first ``k`` of every task: PASTA's multi-task set.

    Args:
        atlases: one per task.
        k: sets to take of each.
        strict: whether all atlases must be of the same model.

    Raises:
        InvalidArgument: if no head is in all, or kinds differ.
        IncompatibleModel: if the atlases are of different models.
    """
    tops = _tops(atlases, k, strict)
    shared = set(tops[0].pairs).intersection(*(top.pairs for top in tops[1:]))
    if not shared:
        raise InvalidArgument(
            f"no head is among the first {k} of all {len(tops)} tasks: take a larger k, or union"
        )
    return HeadSet.of(sorted(shared), tops[0].kind)


def union(atlases: Sequence[HeadAtlas], k: int, strict: bool = True) -> HeadSet:
    """Returns the heads that are among the first ``k`` of some task; see :func:`intersection`."""
    return join(_tops(atlases, k, strict))


def task_agnostic(
    atlases: Mapping[str, HeadAtlas], task: str, k: int, strict: bool = True
) -> HeadSet:
    """Returns the intersection over all tasks but ``task``, on which it is to be evaluated.

    Raises:
        UnknownName: if there is no such task.
        InvalidArgument: if no other task is left, or no head is in all.
    """
    if task not in atlases:
        raise UnknownName("task", task, atlases)
    return intersection([atlases[name] for name in atlases if name != task], k, strict)


def _tops(atlases: Sequence[HeadAtlas], k: int, strict: bool) -> list[HeadSet]:
    if not atlases:
        raise InvalidArgument("expected at least one atlas")
    kinds = {atlas.kind for atlas in atlases}
    if len(kinds) > 1:
        raise InvalidArgument(f"expected atlases of one kind of heads, found {sorted(kinds)}")
    return [atlas.top(k, model=atlases[0].model, strict=strict) for atlas in atlases]
