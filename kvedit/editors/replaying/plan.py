"""Plan: which steps of a lineage must be repeated, and from which memories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvedit.errors import InvalidArgument, NotFound
from kvedit.memory import KVMemory, Lineage, LineageNode

__all__ = ["Lookup", "Plan", "label", "make_plan"]

Lookup = Callable[[str], KVMemory | None]
"""From a step's id, or the content digest of a memory without history, to the memory or None."""

_MAX_STEPS = 20_000
_MAX_TEXT = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What a replay does.

    Args:
        steps: steps to repeat by id, inputs before what is made of them; the last is the head.
        given: memories that are taken as they are, by the id that a step names them by.
    """

    steps: dict[str, LineageNode]
    given: dict[str, KVMemory]

    def uses(self) -> dict[str, int]:
        """Returns how often each memory is read."""
        found = dict.fromkeys((*self.steps, *self.given), 0)
        for node in self.steps.values():
            for name in node.inputs:
                found[name] += 1
        return found


def make_plan(lineage: Lineage, lookup: Lookup) -> Plan:
    """Returns the plan that repeats the head, and as few steps before it as ``lookup`` allows.

    The head itself is never looked up. Lineages from a file are checked here: they may hold
    anything.

    Raises:
        InvalidArgument: if the lineage is empty, malformed, too long or runs in a circle, or
            ``lookup`` hands out another memory than the one asked for.
        NotFound: if a step names an input that is neither a step nor found.
    """
    nodes = _by_id(lineage)
    head = next(reversed(nodes))
    plan = Plan({}, {})
    opened: set[str] = set()
    stack = [(head, False)]
    while stack:
        name, done = stack.pop()
        if done:
            opened.remove(name)
            plan.steps[name] = nodes[name]
        elif name in opened:
            raise InvalidArgument(f"{label(nodes[name])} is an input of itself: no such lineage")
        elif name not in plan.steps and name not in plan.given:
            found = None if name == head else lookup(name)
            if found is not None:
                plan.given[name] = _checked(name, found)
                continue
            if name not in nodes:
                raise NotFound(
                    f"the lineage of {label(nodes[head])} begins with a memory {name[:16]!r} that "
                    "has no step of its own: pass that memory under this id or content digest"
                )
            opened.add(name)
            stack.append((name, True))
            stack.extend((one, False) for one in reversed(nodes[name].inputs))
    return plan


def label(node: LineageNode) -> str:
    """Returns a step in a few words, for messages."""
    return f"step {node.id[:12]} ({str(node.operation)[:40]} {node.name[:40]!r} v{node.version})"


def _by_id(lineage: Lineage) -> dict[str, LineageNode]:
    steps = len(lineage.nodes)
    if not 0 < steps <= _MAX_STEPS:
        raise InvalidArgument(
            f"expected a lineage of 1 to {_MAX_STEPS} steps, found {steps}: without a lineage "
            "nothing can be made again; of a longer one, replay a part"
        )
    nodes: dict[str, LineageNode] = {}
    for place, node in enumerate(lineage.nodes):
        _check_types(place, node)
        nodes.pop(node.id, None)  # the last place counts: the last step is the head
        nodes[node.id] = node
    return nodes


def _check_types(place: int, node: LineageNode) -> None:
    texts = (node.operation, node.name, node.parameters, *node.inputs, node.reproducibility)
    pairs = [part for pair in node.environment for part in pair]
    good = all(isinstance(text, str) and len(text) <= _MAX_TEXT for text in (*texts, *pairs))
    whole = [node.version] if node.seed is None else [node.version, node.seed]
    if not good or not all(type(number) is int for number in whole):
        raise InvalidArgument(
            f"step {place} of the lineage is malformed: expected texts of at most {_MAX_TEXT} "
            "characters and whole numbers"
        )
    try:
        " ".join((*texts, *pairs)).encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"step {place} of the lineage is malformed: {error}") from error


def _checked(name: str, memory: KVMemory) -> KVMemory:
    # Of equal names only; a memory cast to another dtype still has its step.
    head = memory.lineage.head
    if (head is None or head.id != name) and memory.digest != name:
        raise InvalidArgument(
            f"asked for the memory {name[:16]}, found one that was made by "
            f"{head.id[:16] if head else 'no step'} and has content {memory.digest[:16]}"
        )
    return memory
