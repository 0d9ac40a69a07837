"""read_contrast: run both sides of every pair through a model, in batches that can go on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import ContextTooLong, InvalidArgument, UnknownName
from kvedit.memory import ModelSpec
from kvedit.memory.delta import SITES
from kvedit.memory.delta_checks import layer_indices
from kvedit.memory.digest import digest_tensor
from kvedit.models.inspection import Inspection, inspect
from kvedit.steering.batch_folder import BatchFolder
from kvedit.steering.contexts import Read, plain_read, read_tokens, side_source
from kvedit.steering.contrast import Contrast
from kvedit.steering.picking import Picked, pick
from kvedit.steering.readings import Readings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["read_contrast"]


def read_contrast(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    contrast: Contrast,
    *,
    sites: str | Iterable[str] = ("keys", "values"),
    layers: Iterable[int] | None = None,
    read: Read = "last",
    batch: int = 8,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Readings:
    """Returns the vectors of both sides of every pair.

    Contexts are read from position 0, sorted by length, padded on the right. Keys are turned back
    by each token's position and each layer's own rotation; a layer without rotation gives them as
    they are, and so does a model with learned positions, whose keys hold their position for good.

    Args:
        model: a decoder-only model in eval mode.
        tokenizer: its tokenizer; may be None if contexts are token ids.
        contrast: the pairs.
        sites: names of :data:`~kvedit.memory.delta.SITES`.
        layers: layers; negative ones count from the end. None reads all.
        read: which tokens: ``"last"``, ``"mean"`` (all but the first and special ones), a number
            below 0 that counts from the end, or a text or query of tokens, which are averaged.
        batch: rows of a batch; a pair has two.
        folder: keeps finished batches, so that the same call goes on where it was stopped.
        progress: whether to show a progress bar.

    Raises:
        UnknownName: if a site or layer does not exist.
        InvalidArgument: if a number or the folder does not fit, or a context has no such token.
        ContextTooLong: if a context is longer than the model's positions, or than the length at
            which its rotation changes.
        UnsupportedModel: if the model has a mechanism that is not understood.
    """
    names, found = _sites(sites), inspect(model, tokenizer)
    total = len(found.spec.layers)
    kept = layer_indices(range(total) if layers is None else layers, total)
    if not kept or batch < 1:
        raise InvalidArgument(f"expected layers, and a batch of 1 or more; found {kept}, {batch}")
    plain = plain_read(read)
    sides = [side for pair in contrast.pairs for side in (pair.positive, pair.negative)]
    sources = [side_source(tokenizer, side, contrast.prompt) for side in sides]
    rows = [source.tokens for source in sources]
    _check_lengths(found.spec, max(map(len, rows)))
    places = [read_tokens(source, read, tokenizer) for source in sources]
    facts: dict[str, Any] = {
        "contrast": contrast.digest,
        "tokens": digest_tensor(torch.cat([t for row in rows for t in (_count(row), row)])),
        "read": plain,
        "pairs": len(contrast),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    made_of = {**facts, "sites": list(names), "layers": list(kept), "batch": batch}
    fingerprint = asdict(found.spec.fingerprint)
    saved = BatchFolder(folder, {**made_of, "model": fingerprint})
    stacked = _read_all(model, found, rows, places, names, kept, batch, saved, progress)
    positive, negative = (
        {s: {i: v[side::2] for i, v in each.items()} for s, each in stacked.items()}
        for side in (0, 1)
    )
    return Readings(positive, negative, found.spec_now(), facts)


def _read_all(
    model: PreTrainedModel,
    found: Inspection,
    rows: Sequence[torch.Tensor],
    places: Sequence[torch.Tensor],
    sites: Sequence[str],
    layers: Sequence[int],
    batch: int,
    saved: BatchFolder,
    progress: bool,
) -> Picked:
    order = sorted(range(len(rows)), key=lambda row: (len(rows[row]), row))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    pieces: list[dict[str, torch.Tensor]] = []
    for number, chosen in enumerate(_shown(batches, progress)):
        flat = saved.get(number)
        if flat is None:
            picked = pick(
                model, found, [rows[r] for r in chosen], [places[r] for r in chosen], sites, layers
            )
            flat = {f"{s}.{i}": v for s, each in picked.items() for i, v in each.items()}
            saved.put(number, flat)
        pieces.append(flat)
    back = torch.tensor(order).argsort()
    return {
        site: {i: torch.cat([piece[f"{site}.{i}"] for piece in pieces])[back] for i in layers}
        for site in sites
    }


def _sites(sites: str | Iterable[str]) -> tuple[str, ...]:
    named = (sites,) if isinstance(sites, str) else tuple(sites)
    for site in named:
        if site not in SITES:
            raise UnknownName("site of a delta", site, SITES)
    if not named:
        raise InvalidArgument(f"read which sites? There are {', '.join(SITES)}")
    return tuple(site for site in SITES if site in named)


def _check_lengths(spec: ModelSpec, longest: int) -> None:
    # A batch has one set of frequencies: rows past a switch would change those of shorter rows.
    limits = [layer.rope.switch for layer in spec.layers if layer.rope and layer.rope.switch]
    limit = min([*limits, spec.max_position or longest])
    if longest > limit:
        raise ContextTooLong(
            f"a context of {longest} tokens: this model is read up to {limit}, its last position "
            "or the length at which its rotation changes"
        )


def _count(row: torch.Tensor) -> torch.Tensor:
    return torch.tensor([len(row)], dtype=row.dtype)


def _shown(batches: list[list[int]], progress: bool) -> Any:
    if not progress:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, desc="read", unit="batch", disable=None)
