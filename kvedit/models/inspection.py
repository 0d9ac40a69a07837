"""Read a ModelSpec off a live model, or refuse the model by the name of what is not understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch

from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.memory import LayerSpec, ModelSpec, RopeSpec
from kvedit.models.fingerprint import fingerprint, state_key, tensor_version
from kvedit.models.observe import LayerObservation, observe
from kvedit.models.refuse import refuse_unsupported
from kvedit.models.ropefit import RopeBuffer, fit_rope, moves_values, rope_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Inspection", "inspect"]

Positions = Literal["rope", "learned", "none"]


@dataclass(frozen=True, eq=False)
class Inspection:
    """A live model's facts and the places where kvedit touches it.

    Args:
        spec: the facts.
        attention: layer index to attention module.
        buffers: layer index to where the layer's frequencies live; NoPE layers are missing.
    """

    spec: ModelSpec
    attention: Mapping[int, torch.nn.Module]
    buffers: Mapping[int, RopeBuffer]

    def rope_key(self) -> tuple[tuple[int, int], ...]:
        """Returns a cheap key that changes when fixed frequencies are written or replaced.

        Frequencies of types that change with length are left out: they change in normal use.
        """
        fixed = (b for b in dict.fromkeys(self.buffers.values()) if b.switch is None)
        tensors = [buffer.tensor() for buffer in fixed]
        return tuple((tensor.data_ptr(), tensor_version(tensor)) for tensor in tensors)

    def spec_now(self) -> ModelSpec:
        """Returns the spec with the frequencies that are in use at this moment.

        Types that change with length (dynamic NTK, LongRoPE) leave other frequencies after a long
        forward pass; a memory must carry those that rotated its keys.
        """
        layers = list(self.spec.layers)
        for index, buffer in self.buffers.items():
            rope = layers[index].rope
            if rope is not None and rope.switch is not None:
                layers[index] = replace(layers[index], rope=buffer.spec(rope.layout))
        return replace(self.spec, layers=tuple(layers))


_inspected: WeakKeyDictionary[torch.nn.Module, tuple[Any, Inspection]] = WeakKeyDictionary()


def inspect(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Inspection:
    """Returns the facts of a live model: one forward pass of a few single tokens, then kept.

    Args:
        model: a decoder-only causal language model in eval mode.
        tokenizer: its tokenizer, for the fingerprint; None leaves that part empty.

    Raises:
        UnsupportedModel: with the name of the mechanism that is not understood.
        InvalidArgument: if the model is in training mode.
    """
    refuse_unsupported(model)
    if model.training:
        raise InvalidArgument("the model is in training mode (dropout is on): call model.eval()")
    key = (state_key(model), id(getattr(model, "peft_config", None)))
    known = _inspected.get(model)
    fresh = known is not None and known[0] == (key, known[1].rope_key())
    found = known[1] if known and fresh else _read(model)
    _inspected[model] = ((key, found.rope_key()), found)
    prints = fingerprint(model, tokenizer)
    return replace(found, spec=replace(found.spec, fingerprint=prints))


def _read(model: PreTrainedModel) -> Inspection:
    buffers = rope_buffers(model)
    seen = observe(model)
    if list(seen) != list(range(len(seen))):
        raise UnsupportedModel(
            f"only layers {list(seen)} attend through the attention interface; layers between "
            "them use another mechanism"
        )
    learned = moves_values(seen[0])
    try:
        fits = {} if learned else {i: fit_rope(i, layer, buffers) for i, layer in seen.items()}
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{type(model).__name__}, {error}") from None
    found = {index: fit for index, fit in fits.items() if fit is not None}
    if not learned and not found:
        raise UnsupportedModel(
            f"{type(model).__name__}: positions reach neither hidden states nor keys, so they act "
            "on attention logits (ALiBi or relative bias), which edits of slots would break"
        )
    layers = tuple(
        _layer(layer, found[i].spec if i in found else None) for i, layer in seen.items()
    )
    return Inspection(
        spec=_spec(model, layers, "learned" if learned else "rope"),
        attention={index: layer.module for index, layer in seen.items()},
        buffers={index: fit.buffer for index, fit in found.items()},
    )


def _layer(seen: LayerObservation, rope: RopeSpec | None) -> LayerSpec:
    kind, window = seen.window()
    return LayerSpec(
        kind=kind,
        query_heads=seen.query_heads,
        kv_heads=seen.keys.shape[1],
        key_dim=seen.keys.shape[2],
        value_dim=seen.values.shape[2],
        scale=seen.scale,
        window=window,
        softcap=seen.softcap,
        sinks=seen.sinks,
        rope=rope,
    )


def _spec(model: PreTrainedModel, layers: tuple[LayerSpec, ...], positions: Positions) -> ModelSpec:
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return ModelSpec(
        family=str(model.config.model_type),
        name=str(getattr(model, "name_or_path", "") or type(model).__name__),
        layers=layers,
        positions=positions,
        max_position=int(limit) if limit else None,
        vocabulary=int(config.vocab_size),
        fingerprint=fingerprint(model),
    )
