"""Steps: how one node of a lineage is repeated. What can't be is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvedit.editors import REGISTRY, build
from kvedit.editors.base import Editor, Reader
from kvedit.editors.replaying.plan import label
from kvedit.errors import InvalidArgument, KVEditError, NotFound
from kvedit.memory import KVMemory, Lineage, LineageNode
from kvedit.memory.digest import canonical_json

__all__ = ["Means", "Step", "prepare", "run"]

Step = Callable[..., KVMemory]
"""Makes a step's memory from the memories of its inputs."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
# What a foreign parameter makes Python or torch say; running out of memory is not among them.
_ODD = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Means:
    """What a replay may use.

    Args:
        capture: repeats steps that ran a model: ``capture(node, *inputs)``.
        reader: the model, for editors that read.
        pure: whether only steps of class ``"pure"`` are repeated.
    """

    capture: Callable[..., KVMemory] | None = None
    reader: Reader | None = None
    pure: bool = False


def prepare(node: LineageNode, means: Means) -> Step:
    """Returns what repeats ``node``.

    Raises:
        InvalidArgument: if the node can't be repeated here, with the reason.
        NotFound: if the node needs a memory or a callable that was not given.
    """
    if means.pure and node.reproducibility != "pure":
        raise NotFound(
            f"{label(node)} is of class {node.reproducibility!r}: it ran a model, so only its "
            "stored memory will do, and there is none"
        )
    if node.operation == "edit":
        return _codec(node) if node.name == "codec" else _editor(node, means)
    if node.operation in ("capture", "grow") and means.capture is not None:
        return lambda *inputs: means.capture(node, *inputs)  # type: ignore[misc]
    if node.operation in ("capture", "grow"):
        raise NotFound(
            f"{label(node)} ran a model: pass its memory in inputs under {node.id}, or capture= "
            "from kvedit.runtime.recapture.recapturer(model, tokenizer, source)"
        )
    raise NotFound(f"{label(node)} can't be repeated: pass its memory in inputs under {node.id}")


def run(node: LineageNode, step: Step, inputs: tuple[KVMemory, ...]) -> KVMemory:
    """Returns what ``step`` makes of ``inputs``, with ``node`` and today's environment as head.

    Raises:
        InvalidArgument: if the step fails on its parameters, or was another step after all.
        KVEditError: what the step itself raises, with the step as a note.
    """
    try:
        made = step(*_in_recorded_dtype(node, inputs))
    except KVEditError as error:
        error.add_note(f"while replaying {label(node)}")
        raise
    except _ODD as error:
        raise InvalidArgument(f"{label(node)}: {type(error).__name__}: {error}") from error
    head = made.lineage.head
    # Parameters were compared before; fields that came later stand in what was made.
    same = head
    if head and node.operation == "edit" and head.parameters != node.parameters:
        same = replace(head, parameters=node.parameters)
    if same is None or same.id != node.id:
        raise InvalidArgument(
            f"{label(node)} came out as another step: expected {node.describe()}, found "
            f"{head.describe() if head else 'none'}"
        )
    if same is head and node.operation == "edit":
        return made  # the editor joined the lineages already
    return replace(made, lineage=Lineage.join([m.lineage for m in inputs], same))


def _in_recorded_dtype(node: LineageNode, inputs: tuple[KVMemory, ...]) -> tuple[KVMemory, ...]:
    """Casts the first input as it was: ``memory.to(dtype=…)`` leaves no step of its own."""
    name = dict(node.environment).get("dtype")
    if not inputs or name is None or node.operation != "edit":
        return inputs
    if name not in _DTYPES:
        raise InvalidArgument(f"dtype: expected one of {', '.join(_DTYPES)}, found {name[:40]!r}")
    first, dtype = inputs[0], _DTYPES[name]
    return (first if first.dtype == dtype else first.to(dtype=dtype), *inputs[1:])


def _editor(node: LineageNode, means: Means) -> Step:
    try:
        parameters = _parameters(node)
        _check_version(node.name, node.version)
        editor: Editor = build(node.name, **_without_versions(parameters))
        again = json.loads(canonical_json(editor.parameters()))
    except (KVEditError, *_ODD) as error:
        raise InvalidArgument(f"{label(node)} can't be repeated: {error}") from error
    if not _holds(again, _without_versions(parameters)):
        raise InvalidArgument(
            f"{label(node)}: its parameters don't read back as they were written: "
            f"{node.parameters[:200]}"
        )
    if editor.reproducibility != node.reproducibility:
        raise InvalidArgument(
            f"{label(node)} is noted as {node.reproducibility!r}; here the editor is "
            f"{editor.reproducibility!r}"
        )
    if editor.reproducibility == "reader" and means.reader is None:
        raise NotFound(f"{label(node)} reads with the model: pass reader=, or its memory in inputs")
    return lambda *inputs: editor(*inputs, reader=means.reader)


def _codec(node: LineageNode) -> Step:
    from kvedit.store.codecs import approximate

    try:
        parameters = _parameters(node)
    except _ODD as error:
        raise InvalidArgument(f"{label(node)} can't be repeated: {error}") from error
    if set(parameters) != {"codec"}:
        raise InvalidArgument(
            f"{label(node)}: expected the parameter codec, found {sorted(parameters)[:8]}"
        )
    return lambda memory: approximate(memory, parameters["codec"])[0]


def _parameters(node: LineageNode) -> dict[str, Any]:
    found = json.loads(node.parameters)
    # One spelling: a key given twice or NaN would be read in one of several ways.
    if not isinstance(found, dict) or canonical_json(found).decode() != node.parameters:
        raise InvalidArgument(f"expected canonical JSON, found {node.parameters[:200]!r}")
    if "editor" in found:
        raise InvalidArgument("a step's own parameters hold no editor name")
    return found


def _check_version(name: Any, version: Any) -> None:
    if not isinstance(name, str):
        raise InvalidArgument(f"expected the name of an editor, found {str(name)[:40]!r}")
    here = REGISTRY.load(name).version
    if version != here:
        raise InvalidArgument(
            f"editor {name} was version {str(version)[:40]}, here it is version {here}: equal "
            "parameters mean something else; use the kvedit that made it, or its stored memory"
        )


def _without_versions(value: Any) -> Any:
    """Returns parameters without the versions of editors in them, which are checked.

    An editor inside of another one that says no version is of version 1.
    """
    if isinstance(value, list):
        return [_without_versions(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "editor" in value:
        _check_version(value["editor"], value.get("version", 1))
        value = {key: item for key, item in value.items() if key != "version"}
    return {key: _without_versions(item) for key, item in value.items()}


def _holds(again: Any, stored: Any) -> bool:
    """Whether all that was stored is read back; fields that editors got since don't count."""
    if isinstance(stored, Mapping) and isinstance(again, Mapping):
        return all(key in again and _holds(again[key], stored[key]) for key in stored)
    if isinstance(stored, list) and isinstance(again, list):
        return len(again) == len(stored) and all(map(_holds, again, stored))
    return type(again) is type(stored) and bool(again == stored)
