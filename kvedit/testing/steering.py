"""Steering for tests: a random delta of a model, and rows of the editor matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvedit.memory import Delta, KVMemory

__all__ = ["STEER_ROWS", "make_delta", "random_delta"]

_SPANS = [{"tokens": [-6, -2]}, {"sentence": "That is"}]

_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "steer": {},
    "steer-keys": {"keys": 0.7, "values": 0.0, "at": -2},
    "steer-spans": {"keys": -0.5, "values": 2, "at": _SPANS, "layers": [0, -1]},
    "steer-all-heads": {
        "keys": 0.4,
        "values": -1.5,
        "at": "all",
        "kv_heads": {"0": [1], "2": [0]},
        "preserve_norm": True,
    },
}
_IDENTITIES: Mapping[str, Mapping[str, Any]] = {
    "steer-zero": {"keys": 0.0, "values": 0, "at": [{"text": "you would"}]}
}

STEER_ROWS: tuple[Mapping[str, Any], ...] = (
    *(
        {"name": name, "editor": "steer", "parameters": given, "oracle": False}
        for name, given in _CHANGES.items()
    ),
    *(
        {"name": name, "editor": "steer", "parameters": given, "identity": True}
        for name, given in _IDENTITIES.items()
    ),
)
"""Rows of :data:`~kvedit.testing.editor_cases.EDITOR_CASES`, as arguments of its dataclass."""


def random_delta(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    sites: tuple[str, ...] = ("keys", "values"),
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
    scale: float = 1.0,
) -> Delta:
    """Returns standard normal vectors times ``scale``, as a delta of the model.

    Args:
        model: the model.
        tokenizer: its tokenizer, for the fingerprint.
        sites: names of :data:`kvedit.memory.delta.SITES`.
        layers: layers that have a vector; None means all.
        seed: of the vectors.
        scale: their standard deviation.
    """
    import torch

    from kvedit.memory import Delta, Lineage, LineageNode
    from kvedit.models.inspection import inspect

    spec = inspect(model, tokenizer).spec
    hidden = model.config.get_text_config(decoder=True).hidden_size
    draw = torch.Generator().manual_seed(seed)
    vectors: dict[str, dict[int, torch.Tensor]] = {}
    for site in sites:
        for index in range(len(spec.layers)) if layers is None else layers:
            layer = spec.layers[index]
            shapes = {"keys": (layer.kv_heads, layer.key_dim)}
            shapes["values"] = (layer.kv_heads, layer.value_dim)
            shape = shapes.get(site, (hidden,))
            vectors.setdefault(site, {})[index] = scale * torch.randn(shape, generator=draw)
    facts = {"estimator": "random", "seed": seed, "scale": scale}
    node = LineageNode.make("delta", "random", {**facts, "sites": list(sites)}, ())
    return Delta(vectors, spec, facts, Lineage((node,)))


def make_delta(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> KVMemory:
    """Returns an operand of kind "delta": random keys and values of all layers."""
    return random_delta(model, tokenizer).operand()
