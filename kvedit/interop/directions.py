"""Between a delta and plain vectors by layer, which is all that other libraries keep of one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import CorruptMemory, InvalidArgument, ShapeMismatch
from kvedit.interop.live import spec_of
from kvedit.memory import Delta, KVMemory, Lineage, LineageNode, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DeltaReadBack", "check_delta", "delta_of", "delta_parts", "hidden_size", "layer_number"]


@dataclass(frozen=True)
class DeltaReadBack:
    """How far a delta that was read back is from the one that was written.

    Args:
        difference: largest absolute difference of a number.
        largest: largest absolute number of the delta that was written.
        vectors: vectors that were compared.
    """

    difference: float
    largest: float
    vectors: int

    @property
    def relative(self) -> float:
        """The difference as a fraction of the largest number."""
        return self.difference / self.largest if self.largest else self.difference

    def __str__(self) -> str:
        """One line for people."""
        if not self.difference:
            return f"read back: {self.vectors} vectors, equal bit by bit"
        return (
            f"read back: {self.vectors} vectors differ by {self.difference:.2g} at most "
            f"({self.relative:.2g} of the largest number)"
        )


def check_delta(delta: Delta, read_back: Delta) -> DeltaReadBack:
    """Returns how far two deltas are apart.

    Args:
        delta: the one that was written.
        read_back: what was read from there.

    Raises:
        CorruptMemory: if they have vectors at other places.
    """
    one, two = _flat(delta), _flat(read_back)
    if list(one) != list(two) or any(one[place].shape != two[place].shape for place in one):
        raise CorruptMemory(
            f"what was read back has vectors at {[*two][:4]}, what was written at {[*one][:4]}"
        )
    apart = [float((one[place] - two[place]).abs().max()) for place in one]
    return DeltaReadBack(max(apart), max(float(v.abs().max()) for v in one.values()), len(one))


def _flat(delta: Delta) -> dict[tuple[str, int], torch.Tensor]:
    return {(s, i): v for s, layers in delta.vectors.items() for i, v in layers.items()}


def delta_parts(
    delta: Delta | KVMemory, form: str, sites: tuple[str, ...] = ("residual",)
) -> tuple[Delta, dict[str, dict[int, torch.Tensor]]]:
    """Returns the delta of an operand, and its vectors, if a format can say all of them.

    Args:
        delta: the delta, or the operand that a store gave.
        form: name of the format, for messages.
        sites: the sites that it knows.

    Raises:
        InvalidArgument: if the delta has vectors of another site, or it is none.
    """
    whole = Delta.of(delta)
    beyond = [site for site in whole.sites if site not in sites]
    if beyond:
        raise InvalidArgument(
            f"{form} holds vectors of {' and '.join(sites)} only, and this delta has "
            f"{', '.join(beyond)} as well: export delta.only(sites={list(sites)!r})"
        )
    return whole, {site: dict(layers) for site, layers in whole.vectors.items()}


def layer_number(name: Any, where: str) -> int:
    """Returns a layer's number, which files have as text.

    Raises:
        CorruptMemory: if it is none.
    """
    if isinstance(name, int) and not isinstance(name, bool):
        return name
    if isinstance(name, str) and name.removeprefix("-").isascii():
        digits = name.removeprefix("-")
        if digits.isdigit() and len(digits) < 6:
            return int(name)
    raise CorruptMemory(f"{where}: {str(name)[:40]!r} is no number of a layer")


def delta_of(
    vectors: Mapping[int, torch.Tensor],
    model: PreTrainedModel | ModelSpec | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    node: LineageNode,
    facts: Mapping[str, Any],
    hint: str,
    where: str,
    site: str = "residual",
) -> Delta:
    """Returns vectors of a library that does not name its model exactly as a delta of this one.

    Args:
        vectors: layer, negative from the end, to ``[hidden]``.
        model: the model that they are taken to be of, or its facts; None is refused.
        tokenizer: its tokenizer, for the fingerprint.
        node: the step that read them.
        facts: what else there is to keep.
        hint: the model type that they name, or "".
        where: the file or object, for messages.
        site: where they act.

    Raises:
        ShapeMismatch: if they do not fit the model.
        InvalidArgument: if there are none, the model has no such layer, or none is given.
    """
    if model is None:
        raise InvalidArgument(
            f"{where} does not say which model it is for"
            + (f" beyond the type {hint!r}" if hint else "")
            + ": pass the model"
        )
    spec = spec_of(model, tokenizer)
    if hint and hint != spec.family:
        warnings.warn(
            f"{where} names a model of type {hint!r}, and is taken for {spec.name}, of type "
            f"{spec.family!r}: it says no more, so nothing else can be checked",
            UserWarning,
            stacklevel=3,
        )
    if not vectors:
        raise InvalidArgument(f"{where} has no vectors: there is nothing to import")
    found = _numbered(vectors, len(spec.layers), spec.name, where)
    _check_width(found, hidden_size(model), spec.name, where)
    return Delta({site: found}, spec, facts, Lineage((node,)))


def _numbered(
    vectors: Mapping[int, torch.Tensor], total: int, name: str, where: str
) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for given, vector in vectors.items():
        layer = given + total if given < 0 else given
        if not 0 <= layer < total:
            raise InvalidArgument(
                f"{where} has a vector of layer {given}, {name} has {total} layers, from 0: it "
                "was made for another model"
            )
        if layer in found:
            raise InvalidArgument(f"{where} names layer {layer} twice, as {given} and {layer}")
        found[layer] = vector
    return found


def _check_width(
    vectors: Mapping[int, torch.Tensor], hidden: int | None, name: str, where: str
) -> None:
    for layer, vector in vectors.items():
        wanted = hidden if hidden is not None else next(iter(vectors.values())).numel()
        if vector.ndim != 1 or vector.numel() != wanted:
            raise ShapeMismatch(
                f"{where}, layer {layer}: expected a vector [{wanted}], the hidden size of {name}, "
                f"found shape {list(vector.shape)}: it was made for another model"
            )
        if not vector.is_floating_point():
            raise InvalidArgument(
                f"{where}, layer {layer}: {vector.dtype}, no floating-point numbers"
            )


def hidden_size(model: PreTrainedModel | ModelSpec) -> int | None:
    """Returns the size of the residual stream of a live model; its facts alone do not hold it."""
    if isinstance(model, ModelSpec):
        return None
    return int(model.config.get_text_config().hidden_size)
