"""Random vectors as a start: with the model's own statistics, or plain normal ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from kvedit.cartridges.initial.texts import text_tokens
from kvedit.cartridges.order import draws
from kvedit.editors.compacting.budget import as_count
from kvedit.errors import ContextTooLong, InvalidArgument
from kvedit.memory import KVMemory, LayerKV, LayerSpec, Lineage, LineageNode
from kvedit.memory.digest import canonical_json
from kvedit.memory.lineage import environment
from kvedit.models.rope import rotate, unrotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["random_vectors"]

_READ = 512
"""Tokens of generic text that statistics are taken from."""


def random_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    slots: int,
    *,
    seed: int = 0,
    scale: Literal["model", "unit"] = "model",
    sink: bool = True,
) -> KVMemory:
    """Returns slots of random keys and values at positions from 0 on.

    Args:
        model: the model.
        tokenizer: its tokenizer, for generic text.
        slots: number of slots, at least 2.
        seed: of the vectors.
        scale: ``"model"`` draws each dim of each head with the mean and the deviation that the
            model has there over generic text; keys before RoPE, then rotated at their positions.
            ``"unit"`` draws standard normal numbers as the Cartridges code does.
        sink: whether slot 0 is what the model makes of a text's first token, on which most
            attention rests; frozen by default, a random one would stay so.

    Raises:
        InvalidArgument: if an argument is out of range.
        ContextTooLong: if the slots leave no position to the model.
    """
    as_count("slots", slots, 2)
    if scale not in ("model", "unit"):
        raise InvalidArgument(f"scale must be 'model' or 'unit', found {scale!r}")
    known = text_tokens(model, tokenizer, _READ)
    limit = known.model.max_position
    if limit is not None and slots >= limit:
        raise ContextTooLong(
            f"{slots} slots were asked for and {known.model.name} has {limit} positions, of which "
            "a question needs some as well: ask for fewer"
        )
    generator = draws(seed, "vectors", slots)
    layers = {
        index: _layer(layer, known.model.layers[index], slots, scale, sink, generator)
        for index, layer in known.layers.items()
    }
    node = LineageNode(
        operation="start",
        name="random_vectors",
        version=1,
        parameters=canonical_json(
            {
                "slots": slots,
                "scale": scale,
                "sink": sink,
                "model": known.model.identity()["fingerprint"],
            }
        ).decode(),
        reproducibility="reader",
        seed=seed,
        environment=environment(model.dtype),
    )
    return KVMemory(layers, known.model, slots, None, Lineage((node,)))


def _layer(
    known: LayerKV,
    spec: LayerSpec,
    slots: int,
    scale: str,
    sink: bool,
    generator: torch.Generator,
) -> LayerKV:
    positions = torch.arange(slots)
    keys = unrotate(known.keys, spec.rope, known.positions)
    drawn = []
    for states in (keys, known.values):
        noise = torch.randn(
            (states.shape[0], slots, states.shape[2]), generator=generator, dtype=torch.float32
        )
        drawn.append(_scaled(noise, states) if scale == "model" else noise.to(states))
    made = (rotate(drawn[0], spec.rope, positions), drawn[1]) if scale == "model" else drawn
    new_keys, new_values = (tensor.to(known.keys) for tensor in made)
    if sink:
        new_keys[:, 0], new_values[:, 0] = known.keys[:, 0], known.values[:, 0]
    return LayerKV(new_keys, new_values, positions, torch.full((slots,), -1, dtype=torch.int64))


def _scaled(noise: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    # The first token is a sink, far outside of what other tokens have.
    rest = states[:, 1:].float()
    mean, deviation = rest.mean(dim=1, keepdim=True), rest.std(dim=1, keepdim=True)
    return noise.to(rest) * deviation + mean
