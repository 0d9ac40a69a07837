"""Learn projectors and experts from triplets (Li et al. 2026, arXiv 2603.01281, sections 3 and 4).

For each layer and KV head, h are the keys of answer tokens in the context alone and h± those
behind a relevant or irrelevant question, before RoPE (after a key norm). ``Omega± = h^T h± / n =
U S V^T``. P+ projects on the leading columns of U+ that hold a share of the sum of S, P- on the
columns of U- behind those. Heads whose keys the question hardly moves are left out. With a feature
map, all of it is of ``phi(h)`` and ``phi(h±)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from einops import einsum, rearrange

from kvedit.editors.base import Reader
from kvedit.editors.seka.featuremaps import FeatureMapName, named_map
from kvedit.editors.seka.projectors import PROJECTORS, pack_bases
from kvedit.editors.seka.samples import Samples, chosen_layers, sample_keys
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Lineage, LineageNode, ModelSpec
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.memory.lineage import environment
from kvedit.memory.operand import make_operand

__all__ = ["EXPERTS", "learn_experts", "learn_projectors"]

EXPERTS = "experts"
"""The kind of operand that holds experts."""

Measure = Literal["mean", "frobenius"]


def learn_projectors(
    reader: Reader,
    model_spec: ModelSpec,
    triplets: Iterable[Sequence[str]],
    *,
    layers: Sequence[int] | None = None,
    share: float = 0.90,
    min_difference: float = 0.20,
    measure: Measure = "mean",
    limit: int = 200,
    prefix: Sequence[int] = (),
    feature_map: FeatureMapName = "none",
) -> KVMemory:
    """Returns an operand of kind "projectors"; defaults are those of the published code.

    Args:
        reader: the model.
        model_spec: its facts.
        triplets: (context, relevant question, irrelevant question, answer) each.
        layers: layers to learn; negative numbers count from the end; None means the last ten.
        share: gamma, share of the sum of singular values that the leading columns hold, in (0, 1].
        min_difference: delta_min; heads whose keys move less with the question are left out.
        measure: how that is measured, ``"mean"`` (paper) or ``"frobenius"`` (published code); see
            :meth:`~kvedit.editors.seka.samples.Samples.difference`.
        limit: triplets that are read at most.
        prefix: token ids before each text, such as a BOS; none by default, as in the code.
        feature_map: phi of :data:`~kvedit.editors.seka.featuremaps.FEATURE_MAPS`; the editor must
            have the same.

    Raises:
        InvalidArgument: if an option is out of range or the triplets can't be used.
        UnknownName: if there is no such feature map.
    """
    if not 0 < share <= 1:
        raise InvalidArgument(f"share must lie in (0, 1], found {share}")
    chosen, texts = chosen_layers(model_spec, layers), _texts(triplets, limit)
    _check_filter(min_difference, measure)
    phi = named_map(feature_map).forward
    samples = sample_keys(reader, model_spec, texts, chosen, prefix).mapped(phi)
    vectors, entries = {}, []
    for layer in chosen:
        vectors[layer], ranks = _bases(samples, layer, share)
        moved = samples.difference(layer, measure).tolist()
        entries.append({"layer": layer, **ranks, "difference": moved})
    facts = {"share": share, **_facts(measure, min_difference, feature_map)}
    options = {"layers": chosen, "prefix": list(prefix), **facts}
    return make_operand(
        PROJECTORS,
        vectors,
        model_spec,
        _lineage("learn_projectors", model_spec, {"": texts}, options),
        **facts,
        tokens=samples.tokens,
        skipped=samples.skipped,
        layers=entries,
        origin="learned",
    )


def learn_experts(
    reader: Reader,
    model_spec: ModelSpec,
    sets: Mapping[str, Iterable[Sequence[str]]],
    *,
    layers: Sequence[int] | None = None,
    rank: int = 8,
    min_difference: float = 0.20,
    measure: Measure = "mean",
    limit: int = 200,
    prefix: Sequence[int] = (),
    feature_map: FeatureMapName = "none",
) -> KVMemory:
    """Returns an operand of kind "experts": U and S of Omega+ per set of triplets and head.

    A slot is ``sigma_k u_k``: its direction is a column of U, its norm the singular value. The sign
    of a column is free in a decomposition and counts in AdaSEKA's weights, which the published code
    leaves to the library; here each column points to the side of the mean key.

    Args:
        reader: the model.
        model_spec: its facts.
        sets: name of the expert to its triplets.
        layers: layers to learn; None means the last ten.
        rank: leading columns to keep; at most the head size are.
        min_difference: heads of an expert whose keys move less are left out.
        measure: as for :func:`learn_projectors`.
        limit: triplets that are read at most, of each set.
        prefix: token ids before each text.
        feature_map: as for :func:`learn_projectors`.

    Raises:
        InvalidArgument: if an option is out of range, or there is no set.
        UnknownName: if there is no such feature map.
    """
    if not sets or rank < 1:
        raise InvalidArgument(
            f"expected at least one set of triplets and rank 1, found {len(sets)} and {rank}"
        )
    chosen = chosen_layers(model_spec, layers)
    texts = {str(name): _texts(triplets, limit) for name, triplets in sets.items()}
    _check_filter(min_difference, measure)
    phi = named_map(feature_map).forward
    samples = [
        sample_keys(reader, model_spec, one, chosen, prefix).mapped(phi) for one in texts.values()
    ]
    kept = min(rank, *(model_spec.layers[layer].key_dim for layer in chosen))
    vectors, entries = {}, []
    for layer in chosen:
        experts = torch.stack([_expert(one, layer, kept) for one in samples])
        vectors[layer] = rearrange(
            experts, "expert kv_head rank dim -> kv_head (expert rank) dim"
        ).float()
        moved = [one.difference(layer, measure).tolist() for one in samples]
        entries.append({"layer": layer, "difference": moved})
    facts = {"rank": kept, **_facts(measure, min_difference, feature_map)}
    options = {"layers": chosen, "prefix": list(prefix), **facts}
    return make_operand(
        EXPERTS,
        vectors,
        model_spec,
        _lineage("learn_experts", model_spec, texts, options),
        **facts,
        names=list(texts),
        tokens=[one.tokens for one in samples],
        skipped=[one.skipped for one in samples],
        layers=entries,
    )


def _bases(samples: Samples, layer: int, share: float) -> tuple[torch.Tensor, dict[str, list[int]]]:
    """Returns the slots ``[kv_head, slot, dim]`` of a layer, and both ranks of every head."""
    parts, ranks = [], {}
    others = {"positive": samples.relevant, "negative_lead": samples.irrelevant}
    for name, other in others.items():
        columns, values = _decompose(samples.alone[layer], other[layer])
        ranks[name] = _ranks(values, share)
        heads = zip(columns, ranks[name], strict=True)
        parts.append(pack_bases([head[:, :rank].T for head, rank in heads]))
    return torch.cat(parts, dim=1).float(), ranks


def _decompose(alone: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns U ``[kv_head, dim, dim]`` and S ``[kv_head, dim]`` of the cross-covariance."""
    omega = einsum(alone, other, "kv_head token row, kv_head token column -> kv_head row column")
    columns, values, _ = torch.linalg.svd(omega / alone.shape[1])
    return columns, values


def _ranks(values: torch.Tensor, share: float) -> list[int]:
    """Returns per head the least number of leading values that hold the share."""
    total = values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    below = (values.cumsum(dim=-1) / total < share).sum(dim=-1)
    found: list[int] = (below + 1).clamp_max(values.shape[-1]).tolist()
    return found


def _expert(samples: Samples, layer: int, rank: int) -> torch.Tensor:
    """Returns ``sigma_k u_k`` ``[kv_head, rank, dim]``, each towards the mean key."""
    alone = samples.alone[layer]
    columns, values = _decompose(alone, samples.relevant[layer])
    along = einsum(alone.mean(dim=1), columns, "kv_head row, kv_head row rank -> kv_head rank")
    signed = torch.where(along < 0, -values, values)
    scaled = columns * signed[:, None, :]
    return rearrange(scaled[..., :rank], "kv_head row rank -> kv_head rank row")


def _texts(triplets: Iterable[Sequence[str]], limit: int) -> list[list[str]]:
    if limit < 1:
        raise InvalidArgument(f"limit: expected at least 1, found {limit}")
    found = [list(one) for one in islice(triplets, limit)]
    if not found or not all(len(one) == 4 and all(map(_is_text, one)) for one in found):
        raise InvalidArgument(
            "expected triplets of four texts each: context, relevant question, irrelevant "
            "question, answer"
        )
    return found


def _is_text(part: Any) -> bool:
    return isinstance(part, str) and bool(part)


def _check_filter(min_difference: float, measure: str) -> None:
    if not min_difference >= 0 or measure not in ("mean", "frobenius"):
        raise InvalidArgument(
            "expected min_difference of 0 or more and measure 'mean' or 'frobenius', found "
            f"{min_difference} and {measure!r}"
        )


def _facts(measure: str, min_difference: float, name: str) -> dict[str, Any]:
    facts = {"measure": measure, "min_difference": float(min_difference)}
    # Left out where there is none: operands that were learned before keep their digests.
    return facts if name == "none" else {**facts, "feature_map": name}


def _lineage(
    name: str, spec: ModelSpec, texts: Mapping[str, Any], options: Mapping[str, Any]
) -> Lineage:
    parameters = {
        "model": spec.identity()["fingerprint"],
        "triplets": {key: digest_bytes(canonical_json(value)) for key, value in texts.items()},
        **options,
    }
    node = LineageNode(
        operation="capture",
        name=name,
        version=1,
        parameters=canonical_json(parameters).decode(),
        reproducibility="reader",
        environment=environment(),
    )
    return Lineage((node,))
