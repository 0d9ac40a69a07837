"""extract: a delta from a contrast set; and several, one per kind of pair."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvedit.memory import Delta, Lineage, LineageNode
from kvedit.steering.contexts import Read
from kvedit.steering.contrast import Contrast
from kvedit.steering.estimators import Estimator, clusters
from kvedit.steering.reading import read_contrast
from kvedit.steering.readings import Readings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["cluster_deltas", "delta_of", "extract", "extract_clusters"]

EstimatorLike = str | Estimator | Mapping[str, Any]


def extract(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    contrast: Contrast | Iterable[Any],
    *,
    sites: str | Iterable[str] = ("keys", "values"),
    layers: Iterable[int] | None = None,
    read: Read = "last",
    estimator: EstimatorLike = "mean",
    batch: int = 8,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Delta:
    """Returns the delta that a contrast set's positive sides have over its negative ones.

    Args:
        model: a decoder-only model in eval mode.
        tokenizer: its tokenizer; may be None if contexts are token ids.
        contrast: the pairs, or a list of ``(positive, negative)``.
        sites: names of :data:`~kvedit.memory.delta.SITES`.
        layers: layers; negative ones count from the end. None takes all.
        read: which tokens, see :func:`~kvedit.steering.reading.read_contrast`.
        estimator: a name of :data:`~kvedit.steering.estimators.ESTIMATORS`, or an
            :class:`~kvedit.steering.estimators.Estimator`; keys and values are estimated per KV
            head, streams as a whole.
        batch: rows that are read at once.
        folder: keeps what was read, so that the same call goes on where it was stopped, and other
            estimators need no further reading.
        seed: written into the lineage; none of today's estimators draws.
        progress: whether to show a progress bar.

    Raises:
        UnknownName: if a site, layer or estimator does not exist.
        InvalidArgument: if a value does not fit; see
            :func:`~kvedit.steering.reading.read_contrast`.
    """
    chosen = Estimator.of(estimator)
    readings = read_contrast(
        model, tokenizer, Contrast.of(contrast), sites=sites, layers=layers, read=read,
        batch=batch, folder=folder, progress=progress,
    )  # fmt: skip
    return delta_of(readings, chosen, seed=seed)


def extract_clusters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    contrast: Contrast | Iterable[Any],
    count: int,
    *,
    sites: str | Iterable[str] = ("keys", "values"),
    layers: Iterable[int] | None = None,
    read: Read = "last",
    batch: int = 8,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Delta]:
    """Returns one mean difference per cluster of pairs, the largest cluster first.

    Arguments are those of :func:`extract`; ``count`` is the number of clusters. See
    :func:`cluster_deltas`.
    """
    readings = read_contrast(
        model, tokenizer, Contrast.of(contrast), sites=sites, layers=layers, read=read,
        batch=batch, folder=folder, progress=progress,
    )  # fmt: skip
    return cluster_deltas(readings, count, seed)


def delta_of(
    readings: Readings,
    estimator: EstimatorLike = "mean",
    *,
    seed: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> Delta:
    """Returns the delta that an estimator finds in readings.

    Args:
        readings: vectors of all pairs.
        estimator: a name, or an estimator.
        seed: written into the lineage.
        extra: further plain facts.
    """
    chosen = Estimator.of(estimator)
    vectors: dict[str, dict[int, torch.Tensor]] = {}
    for site, layers in readings.positive.items():
        for layer, states in layers.items():
            first, second = readings.sides(site, layer)
            heads = zip(first.unbind(1), second.unbind(1), strict=True)
            found = torch.stack([chosen(one, other) for one, other in heads])
            vectors.setdefault(site, {})[layer] = found if states.ndim == 3 else found[0]
    facts = {**readings.facts, "estimator": chosen.parameters(), **(extra or {})}
    parameters = {
        **facts,
        "model": readings.model.identity()["fingerprint"],
        "sites": list(readings.sites),
        "layers": list(readings.layers),
    }
    node = LineageNode.make("extract", "extract", parameters, reproducibility="reader", seed=seed)
    return Delta(vectors, readings.model, facts, Lineage((node,)))


def cluster_deltas(readings: Readings, count: int, seed: int = 0) -> list[Delta]:
    """Returns one mean difference per cluster of pairs, the largest cluster first.

    A pair belongs to one cluster over all layers and heads. Differences of every site and layer
    count equally: each is divided by its own root mean square length over the pairs.

    Args:
        readings: vectors of all pairs.
        count: number of clusters.
        seed: of k-means.

    Raises:
        InvalidArgument: if there are more clusters than different pairs.
    """
    parts = []
    for site, layers in readings.positive.items():
        for layer in layers:
            first, second = readings.sides(site, layer)
            apart = (first - second).flatten(1)
            size = apart.square().sum(dim=1).mean().sqrt()
            parts.append(apart / size if float(size) > 0 else apart)
    labels = clusters(torch.cat(parts, dim=1), count, seed)
    deltas = []
    for one in range(count):
        members = (labels == one).nonzero().squeeze(1).tolist()
        facts = {"cluster": one, "clusters": count, "members": members}
        deltas.append(delta_of(readings.part(members), "mean", seed=seed, extra=facts))
    return deltas
