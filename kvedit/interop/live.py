"""From plain keys and values to a memory of a live model, checked against that model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvedit.axes import expect_axes
from kvedit.errors import CorruptMemory, IncompatibleModel, InvalidArgument
from kvedit.interop.prefix import Prefix
from kvedit.memory import Fingerprint, KVMemory, LayerKV, Lineage, LineageNode, ModelSpec, Source
from kvedit.memory.digest import canonical_json
from kvedit.memory.lineage import environment
from kvedit.models.loading import as_dtype
from kvedit.store.parsing import SHAPE_ERRORS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_made_for", "import_node", "imported_facts", "memory_of", "spec_of", "use_dtype"]


def spec_of(
    model: PreTrainedModel | ModelSpec, tokenizer: PreTrainedTokenizerBase | None
) -> ModelSpec:
    """Returns the facts of a live model, or those that are given.

    Raises:
        UnsupportedModel: if the model has a mechanism that is not understood.
    """
    if isinstance(model, ModelSpec):
        return model
    from kvedit.models.inspection import inspect

    return inspect(model, tokenizer).spec


def use_dtype(
    model: PreTrainedModel | ModelSpec | None, wanted: torch.dtype | str | None
) -> torch.dtype | None:
    """Returns the dtype that a memory is imported in; None keeps the file's.

    Without a wish it is the model's compute dtype, in which an engine would use the file.
    """
    if wanted is not None or model is None or isinstance(model, ModelSpec):
        return as_dtype(wanted)
    found: torch.dtype = model.dtype
    return found


def memory_of(
    prefix: Prefix,
    spec: ModelSpec,
    node: LineageNode,
    dtype: torch.dtype | None = None,
    source: Source | None = None,
) -> KVMemory:
    """Returns a prefix as a memory: positions 0 to p - 1, the first query at p.

    Args:
        prefix: plain keys and values.
        spec: facts of the model.
        node: the step that read it.
        dtype: of keys and values; None keeps the prefix's.
        source: the text that it stands for; its slots are nobody's tokens all the same.

    Raises:
        ShapeMismatch: if it does not fit the model.
        InvalidArgument: if it has no slots, or numbers that are not finite.
    """
    if len(prefix.keys) != len(spec.layers) or len(prefix.values) != len(spec.layers):
        raise InvalidArgument(
            f"the file has keys of {len(prefix.keys)} and values of {len(prefix.values)} layers, "
            f"{spec.name} has {len(spec.layers)} layers: it was made for another model"
        )
    slots = prefix.slots
    if not slots:
        raise InvalidArgument("the file has no slots: there is nothing to import")
    positions = torch.arange(slots)
    nobody = torch.full((slots,), -1, dtype=torch.int64)
    layers = {}
    for index, layer in enumerate(spec.layers):
        states = {"keys": prefix.keys[index], "values": prefix.values[index]}
        dims = {"keys": layer.key_dim, "values": layer.value_dim}
        for kind, tensor in states.items():
            _check(f"layer {index} {kind}", tensor, layer.kv_heads, slots, dims[kind])
            states[kind] = tensor.to(dtype=dtype).contiguous()
        layers[index] = LayerKV(**states, positions=positions, source=nobody)
    return KVMemory(layers, spec, slots, source, Lineage((node,)))


def _check(name: str, tensor: torch.Tensor, heads: int, slots: int, dim: int) -> None:
    expect_axes(f"the file's {name}", tensor, "head slot dim", head=heads, slot=slots, dim=dim)
    if not tensor.is_floating_point():
        raise InvalidArgument(f"the file's {name} are {tensor.dtype}, no floating-point numbers")
    if not bool(tensor.isfinite().all()):
        raise InvalidArgument(f"the file's {name} hold NaN or infinite numbers")


def import_node(
    form: str,
    files: Mapping[str, str],
    facts: Mapping[str, Any] | None = None,
    inputs: tuple[str, ...] = (),
) -> LineageNode:
    """Returns the step that read some files.

    Args:
        form: name of the format.
        files: name of each file to its BLAKE3.
        facts: what else was found in them, as plain data.
        inputs: ids of the steps that the files name as their own.
    """
    return LineageNode(
        operation="import",
        name=form,
        version=1,
        parameters=canonical_json({"files": dict(files), **(facts or {})}).decode(),
        inputs=inputs,
        environment=environment(),
    )


def imported_facts(memory: KVMemory) -> dict[str, Any]:
    """Returns what the last import found beside the tensors, such as the number of frozen slots.

    Empty for a memory that was never imported.
    """
    nodes = [node for node in memory.lineage.nodes if node.operation == "import"]
    return dict(json.loads(nodes[-1].parameters)) if nodes else {}


def check_made_for(facts: Mapping[str, Any], spec: ModelSpec, strict: bool, where: str) -> None:
    """Raises unless a file that names its model names this one.

    Args:
        facts: what the file says of itself; other libraries' files say nothing.
        spec: facts of the live model.
        strict: whether it matters.
        where: the file, for messages.

    Raises:
        IncompatibleModel: with what differs.
        CorruptMemory: if the facts can't be read.
    """
    if not strict or "fingerprint" not in facts:
        return
    try:
        made = Fingerprint(**facts["fingerprint"])
        pairs = made.differences(spec.fingerprint)
        reasons = [f"{n} (file {a[:18]}, model {b[:18]})" for n, (a, b) in pairs.items()]
    except SHAPE_ERRORS as error:
        raise CorruptMemory(f"{where}: its fingerprint can't be read: {error}") from error
    if reasons:
        raise IncompatibleModel(
            f"{where} was made for another model than {spec.name}: {', '.join(reasons)}; "
            "strict=False takes it anyway"
        )
