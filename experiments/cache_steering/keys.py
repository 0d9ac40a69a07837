"""Keys averaged as they are rotated, as published: what un-rotated ones are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import kvedit as kv
from kvedit.models.rope import rotate
from kvedit.steering import Contrast, read_contrast
from kvedit.steering.contexts import side_source

Raw = Mapping[int, torch.Tensor]
"""Layer to ``[kv_head, dim]``."""


def raw_delta(
    model: Any, tokenizer: Any, contrast: Contrast, folder: Path, sites: Sequence[str]
) -> Raw:
    """Returns the mean difference of last keys after RoPE, each at its own prompt's position."""
    found = read_contrast(model, tokenizer, contrast, sites=sites, folder=folder)
    sides = {"positive": found.positive["keys"], "negative": found.negative["keys"]}
    ends = {
        name: torch.tensor([len(side_source(tokenizer, getattr(pair, name), None).tokens) - 1
                            for pair in contrast.pairs]) for name in sides
    }  # fmt: skip
    raw = {}
    for layer, spec in enumerate(found.model.layers):
        # [pair, kv_head, dim] -> [kv_head, pair, dim]: the pairs are what has positions here.
        one, other = (rotate(read[layer].transpose(0, 1), spec.rope, ends[name])
                      for name, read in sides.items())  # fmt: skip
        raw[layer] = (one - other).mean(dim=1)
    return raw


def raw_in_cache(delta: kv.Delta, values: float, raw: Raw, keys: float) -> Callable[..., Any]:
    """Returns the edit that adds values as always, and raw keys without turning them."""
    layers = tuple(range(1, len(delta.model.layers)))
    edit, operand = kv.editors.Steer(values=values, layers=layers), delta.operand()

    def steer(memory: kv.KVMemory) -> kv.KVMemory:
        steered = edit(memory, operand)
        changed = {}
        for index in layers:
            layer = steered.layers[index]
            states = layer.keys.clone()
            states[:, -1] += keys * raw[index]
            changed[index] = dataclasses.replace(layer, keys=states)
        return steered.with_layers(changed)

    return steer
