"""Vectors that live in another library's objects: steering-vectors and repeng. Neither is imported.

Told by their attributes, so plain dictionaries of the same names do as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.interop.directions import delta_of, layer_number
from kvedit.interop.live import import_node
from kvedit.memory import Delta, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LAYER_TYPES", "from_repeng", "from_steering_vectors"]

LAYER_TYPES: Mapping[str, str] = {"decoder_block": "residual", "self_attn": "attention"}
"""Layer types of steering-vectors that a delta has a site for."""


def from_steering_vectors(
    vector: Any,
    model: PreTrainedModel | ModelSpec,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Delta:
    """Returns a ``SteeringVector`` of the steering-vectors library as a delta.

    It names no model at all: what fits is taken to be of this one.

    Args:
        vector: the object, or a mapping with ``layer_activations`` and ``layer_type``.
        model: the model that it was trained on, or its facts.
        tokenizer: its tokenizer, for the fingerprint.

    Raises:
        InvalidArgument: if it is something else, or of a layer type that a delta has no site for.
        ShapeMismatch: if it does not fit the model.
    """
    where = "this steering vector"
    layers = _mapping(vector, "layer_activations", where)
    kind = _named(vector, "layer_type", "decoder_block")
    if kind not in LAYER_TYPES:
        raise InvalidArgument(
            f"{where} acts on {str(kind)[:40]!r}; a delta has sites for {', '.join(LAYER_TYPES)}"
        )
    facts = {"estimator": "unknown", "format": "steering-vectors"}
    node = import_node("steering-vectors", {}, {"layer_type": kind})
    return delta_of(
        _vectors(layers, where), model, tokenizer,
        node=node, facts=facts, hint="", where=where, site=LAYER_TYPES[kind],
    )  # fmt: skip


def from_repeng(
    vector: Any,
    model: PreTrainedModel | ModelSpec,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Delta:
    """Returns a ``ControlVector`` of repeng as a delta of the residual stream.

    Args:
        vector: the object, a mapping with ``directions`` (and ``model_type``), or the directions
            themselves: layer to vector.
        model: the model that it was trained on, or its facts; another model type is only warned
            of, as repeng does.
        tokenizer: its tokenizer, for the fingerprint.

    Raises:
        InvalidArgument: if it is something else.
        ShapeMismatch: if it does not fit the model.
    """
    where = "this control vector"
    bare = isinstance(vector, Mapping) and "directions" not in vector
    layers = vector if bare else _mapping(vector, "directions", where)
    hint = "" if bare else str(_named(vector, "model_type", ""))
    facts = {"estimator": "unknown", "format": "repeng"}
    node = import_node("repeng", {}, {"model_hint": hint})
    return delta_of(
        _vectors(layers, where), model, tokenizer, node=node, facts=facts, hint=hint, where=where
    )


def _named(vector: Any, name: str, otherwise: Any) -> Any:
    if isinstance(vector, Mapping):
        return vector.get(name, otherwise)
    return getattr(vector, name, otherwise)


def _mapping(vector: Any, name: str, where: str) -> Mapping[Any, Any]:
    if isinstance(vector, str | bytes | os.PathLike):
        raise InvalidArgument(
            f"{where} is a path or bytes: these libraries keep pickles, and reading one can run "
            "anything on this machine. Load it yourself where you trust it, and pass the object"
        )
    found = _named(vector, name, None)
    if not isinstance(found, Mapping):
        raise InvalidArgument(
            f"{where}: expected an object or mapping with {name!r}, layer to vector, found "
            f"{type(vector).__name__}"
        )
    return found


def _vectors(layers: Mapping[Any, Any], where: str) -> dict[int, torch.Tensor]:
    found = {}
    for name, vector in layers.items():
        layer = layer_number(name, where)
        try:
            tensor = torch.as_tensor(vector).detach().to("cpu", copy=True)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgument(
                f"{where}, layer {layer}: expected a tensor or array, found {type(vector).__name__}"
            ) from error
        found[layer] = tensor
    return found
