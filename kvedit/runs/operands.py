"""Operands of editors: taken from the store under the model's name, or made once and put there.

A delta is not made here: which texts it tells apart is for somebody to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvedit.editors import Editor
from kvedit.errors import InvalidArgument, NotFound, UnknownName
from kvedit.memory import KVMemory, ModelSpec
from kvedit.memory.delta import DELTA
from kvedit.models.inspection import inspect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvedit.store import Store

__all__ = ["GIVEN", "KINDS", "check_makeable", "make", "operand_name", "stored", "supply"]

_SEED, _TRIPLETS = 0, 64


def operand_name(kind: str, spec: ModelSpec) -> str:
    """Returns the name under which a store keeps a model's operand of a kind."""
    prints = spec.fingerprint
    return f"operands/{kind}-{prints.config[:8]}-{prints.weights.split(':')[-1][:12]}"


def stored(store: Store, kind: str, spec: ModelSpec) -> KVMemory | None:
    """Returns the operand that the store holds for this model, or None."""
    try:
        return store.get(operand_name(kind, spec))
    except NotFound:
        return None


def check_makeable(kind: str) -> None:
    """Checks that an operand can be made of a model alone.

    Raises:
        InvalidArgument: if it must be given; the message says how.
        UnknownName: if nobody knows how to make one of that kind.
    """
    if kind in GIVEN:
        raise InvalidArgument(GIVEN[kind])
    if kind not in KINDS:
        raise UnknownName("kind of operand", kind, KINDS)


def make(kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> KVMemory:
    """Returns a new operand of the model.

    Raises:
        InvalidArgument: if it must be given.
        UnknownName: if nobody knows how to make one of that kind.
    """
    check_makeable(kind)
    return KINDS[kind](model, tokenizer)


def supply(
    editor: Editor,
    store: Store,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None] = lambda _: None,
) -> list[KVMemory]:
    """Returns the operands that an editor needs; what the store lacks is made and put there.

    Raises:
        InvalidArgument: if the store lacks one that must be given.
        UnknownName: if nobody knows how to make one of that kind.
    """
    spec = inspect(model, tokenizer).spec
    found = []
    for kind in editor.operands:
        operand = stored(store, kind, spec)
        if operand is None:
            check_makeable(kind)
            say(f"operand of kind {kind!r}: none in the store for this model, so it is made once")
            operand = make(kind, model, tokenizer)
            store.put(operand, operand_name(kind, spec), message=f"{kind} of {spec.name}")
        found.append(operand)
    return found


def _queries(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> KVMemory:
    from kvedit.runtime import calibrate

    return calibrate(model, tokenizer)


def _projectors(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> KVMemory:
    from kvedit.editors.seka import learn_projectors, synthetic_triplets
    from kvedit.runtime import ModelReader

    triplets = synthetic_triplets(seed=_SEED, n=_TRIPLETS)
    spec = inspect(model, tokenizer).spec
    return learn_projectors(ModelReader(model, tokenizer), spec, triplets)


def _experts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> KVMemory:
    from kvedit.editors.seka import learn_experts, synthetic_triplets
    from kvedit.runtime import ModelReader

    # One expert per draw of the templates; a task's own triplets make better ones.
    sets = {f"templates-{seed}": synthetic_triplets(seed=seed, n=_TRIPLETS) for seed in range(3)}
    return learn_experts(ModelReader(model, tokenizer), inspect(model, tokenizer).spec, sets)


KINDS: dict[str, Callable[[PreTrainedModel, PreTrainedTokenizerBase], KVMemory]] = {
    "experts": _experts,
    "projectors": _projectors,
    "queries": _queries,
}
"""Kinds of operands, and what makes one."""

GIVEN: dict[str, str] = {
    DELTA: "this editor adds a steering delta, and none was given: make one with `kvedit extract "
    "PAIRS --as DELTA`, and name it behind the memory: `kvedit edit NAME DELTA --as NEW --editor "
    "steer KEY=VALUE ...`",
}
"""Kinds of operands that texts decide, and how they are made and given."""
