"""What a memory knows about the model that made it: heads, windows, RoPE, fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

__all__ = ["Fingerprint", "LayerSpec", "ModelSpec", "RopeSpec"]


@dataclass(frozen=True)
class RopeSpec:
    """The rotation that one layer applies to its queries and keys (Su et al. 2021, RoFormer).

    Args:
        kind: the transformers name of the RoPE type, for example ``"default"`` or ``"yarn"``.
        inv_freq: inverse frequencies in use, radians per position, one per rotated pair (fp32).
        scaling: factor on rotated dims that the type folds into cos and sin (YaRN's
            ``mscale``); 1.0 for most.
        layout: ``"half"`` pairs dim i with i + r/2, ``"interleaved"`` pairs 2i with 2i + 1.
        switch: positions from which this type changes its frequencies (dynamic NTK, LongRoPE),
            or None if it never does.
    """

    kind: str
    inv_freq: tuple[float, ...]
    scaling: float
    layout: Literal["half", "interleaved"]
    switch: int | None = None

    @property
    def rotated(self) -> int:
        """How many leading dims of each head are rotated."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer.

    Args:
        kind: ``"full"``, ``"sliding"`` or ``"chunked"``: which past positions a query sees.
        query_heads: number of query heads.
        kv_heads: number of key-value heads.
        key_dim: head size of keys.
        value_dim: head size of values.
        scale: factor on query-key products.
        window: positions a query sees, itself included; None for a full layer.
        softcap: cap on logits by ``softcap * tanh(logit / softcap)``, or None.
        sinks: whether the softmax has a learned sink logit per head.
        rope: the layer's rotation, or None for a layer without position encoding (NoPE).
    """

    kind: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    rope: RopeSpec | None = None

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True)
class Fingerprint:
    """Digests (BLAKE3, hex) that tell one model from another; none depends on compute dtype.

    Args:
        config: of the architecture's configuration.
        weights: of the weight files, or of the live tensors where there is no file.
        tokenizer: of vocabulary, merges and special tokens; empty without a tokenizer.
        adapters: of active adapters; empty without any.
    """

    config: str
    weights: str
    tokenizer: str = ""
    adapters: str = ""

    def differences(self, other: Fingerprint) -> dict[str, tuple[str, str]]:
        """Returns the parts that differ, each as (this, other); an unknown tokenizer fits all."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        if not (self.tokenizer and other.tokenizer):
            pairs.pop("tokenizer")
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True)
class ModelSpec:
    """Facts of a model that a memory carries, so that it can be edited and checked without it.

    Args:
        family: ``model_type`` of the configuration.
        name: what the model was loaded as; for people, not part of any identity.
        layers: one entry per attention layer.
        positions: ``"rope"``, ``"learned"`` (absolute embeddings) or ``"none"``.
        max_position: positions that the model was made for, or None if it names none.
        vocabulary: size of the output layer.
        fingerprint: what tells this model from others.
    """

    family: str
    name: str
    layers: tuple[LayerSpec, ...]
    positions: Literal["rope", "learned", "none"]
    max_position: int | None
    vocabulary: int
    fingerprint: Fingerprint

    def bytes_per_token(self, itemsize: int) -> int:
        """Returns the bytes of keys and values that one token adds over all layers."""
        sizes = (spec.kv_heads * (spec.key_dim + spec.value_dim) for spec in self.layers)
        return itemsize * sum(sizes)

    def identity(self) -> dict[str, Any]:
        """Returns the part of :meth:`to_json` that counts for the identity of a memory."""
        return {key: value for key, value in self.to_json().items() if key != "name"}

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; RoPE facts that layers share are written once."""
        ropes = list(dict.fromkeys(spec.rope for spec in self.layers if spec.rope))
        layers = [
            {**asdict(spec), "rope": ropes.index(spec.rope) if spec.rope else None}
            for spec in self.layers
        ]
        return {
            "family": self.family,
            "name": self.name,
            "layers": layers,
            "ropes": [{**asdict(rope), "inv_freq": list(rope.inv_freq)} for rope in ropes],
            "positions": self.positions,
            "max_position": self.max_position,
            "vocabulary": self.vocabulary,
            "fingerprint": asdict(self.fingerprint),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Returns the spec that :meth:`to_json` wrote."""
        ropes = [
            RopeSpec(**{**rope, "inv_freq": tuple(rope["inv_freq"])}) for rope in data["ropes"]
        ]
        layers = tuple(
            LayerSpec(**{**spec, "rope": None if spec["rope"] is None else ropes[spec["rope"]]})
            for spec in data["layers"]
        )
        plain = {key: data[key] for key in ("family", "name", "positions", "max_position")}
        return cls(
            **plain,
            vocabulary=data["vocabulary"],
            layers=layers,
            fingerprint=Fingerprint(**data["fingerprint"]),
        )
