"""replay and rebuild: walk a lineage back to what is at hand, and repeat the steps from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvedit.editors.base import Reader
from kvedit.editors.replaying.plan import Lookup, Plan, make_plan
from kvedit.editors.replaying.steps import Means, prepare, run
from kvedit.errors import NotFound
from kvedit.memory import KVMemory, Lineage

__all__ = ["rebuild", "replay"]


def replay(
    memory: KVMemory | Lineage,
    inputs: Mapping[str, KVMemory] | Lookup | None = None,
    capture: Callable[..., KVMemory] | None = None,
    reader: Reader | None = None,
) -> KVMemory:
    """Returns the memory of the lineage's head, made again.

    The head is always repeated. Before it, a memory that ``inputs`` has is taken as it is and the
    walk ends there; other steps are repeated. All steps are checked before the first one runs:
    only editors of the registry are built, of the version that the step names. A memory that was
    cast leaves no step, so an edit's input is cast to the dtype that the edit noted, and the
    result to the dtype of ``memory``, if that is a memory. Steps of class ``"pure"`` give the
    same bits on the same machine and versions; :func:`compare_replay` tells for all.

    A lineage of unknown origin may hold a regular expression that takes forever.

    Args:
        memory: the memory, or only its lineage.
        inputs: memories by the id of the step that made them, or by content digest for those
            without history; or a callable that returns one, or None.
        capture: repeats captures and growth, called as ``capture(node, *inputs)``;
            :func:`kvedit.runtime.recapture.recapturer` makes one.
        reader: the model, for editors that read with it.

    Raises:
        InvalidArgument: if a step is malformed, of another version, or comes out as another step.
        NotFound: if a step can't be repeated and its memory is not given; says what to pass.
    """
    lineage = memory.lineage if isinstance(memory, KVMemory) else memory
    lookup = inputs if callable(inputs) else dict(inputs or {}).get
    made = _run(make_plan(lineage, lookup), Means(capture, reader))
    if isinstance(memory, KVMemory) and made.dtype != memory.dtype:
        return made.to(dtype=memory.dtype)
    return made


def rebuild(lineage: Lineage, fetch: Callable[[str], KVMemory]) -> KVMemory:
    """Returns the memory of a recipe: its head and what lies between it and stored memories.

    For stores, which compare the content digest themselves. Only steps of class ``"pure"`` are
    repeated.

    Args:
        lineage: lineage of the memory of which only the recipe is stored.
        fetch: returns the stored memory that a step made, by the step's id or, for a memory
            without history, by content digest. Never asked for the head.

    Raises:
        NotFound: if a memory that is needed is not stored.
        InvalidArgument: if a step is malformed, of another version, or comes out as another step.
    """

    def stored(name: str) -> KVMemory | None:
        try:
            return fetch(name)
        except NotFound:
            return None

    return _run(make_plan(lineage, stored), Means(pure=True))


def _run(plan: Plan, means: Means) -> KVMemory:
    steps = {name: prepare(node, means) for name, node in plan.steps.items()}
    left, made = plan.uses(), dict(plan.given)
    for name, node in plan.steps.items():
        inputs = tuple(made[one] for one in node.inputs)
        made[name] = run(node, steps[name], inputs)
        for one in node.inputs:
            left[one] -= 1
            if not left[one]:
                made.pop(one, None)  # a long lineage must not hold every memory on the way
    return made[name]
