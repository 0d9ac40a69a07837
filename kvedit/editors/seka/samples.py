"""Samples: keys of answers, as a context alone and a context behind a question have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from kvedit.axes import expect_axes
from kvedit.editors.base import Reader
from kvedit.editors.seka.triplets import Triplet
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.memory import ModelSpec

__all__ = ["Samples", "chosen_layers", "sample_keys"]

_LAST = 10  # layers of the published code: "last10"


@dataclass(frozen=True, eq=False)
class Samples:
    """Keys of answer tokens before RoPE, one row per token, in equal order.

    Args:
        alone: layer to float64 ``[kv_head, token, dim]``: the context alone (h).
        relevant: the same behind the relevant question (h+).
        irrelevant: the same behind the irrelevant one (h-).
        skipped: triplets whose answer the tokenizer cuts differently behind a question.
    """

    alone: dict[int, torch.Tensor]
    relevant: dict[int, torch.Tensor]
    irrelevant: dict[int, torch.Tensor]
    skipped: int

    @property
    def tokens(self) -> int:
        """Number of rows."""
        return next(iter(self.alone.values())).shape[1]

    def mapped(self, phi: Callable[[torch.Tensor], torch.Tensor]) -> Samples:
        """Returns ``phi`` of all keys, in equal order."""
        alone, relevant, irrelevant = (
            {layer: phi(keys) for layer, keys in kept.items()}
            for kept in (self.alone, self.relevant, self.irrelevant)
        )
        return Samples(alone, relevant, irrelevant, self.skipped)

    def difference(self, layer: int, measure: str) -> torch.Tensor:
        """Returns how far a head's keys move with the question, float64 ``[kv_head]``.

        Args:
            layer: layer index.
            measure: ``"mean"``, the mean of ``|h+ - h-|`` over tokens (paper), or
                ``"frobenius"``, the norm of all rows together over their number (published
                code), which shrinks with the root of that number.
        """
        moved: torch.Tensor = self.relevant[layer] - self.irrelevant[layer]
        norms: torch.Tensor
        if measure == "mean":
            norms = moved.norm(dim=-1).mean(dim=-1)
        else:
            norms = moved.flatten(1).norm(dim=-1) / moved.shape[1]
        return norms


def chosen_layers(spec: ModelSpec, layers: Sequence[int] | None) -> list[int]:
    """Returns layer indices in order; negative ones count from the end, None means the last ten.

    Raises:
        UnknownName: if the model lacks one of them.
        InvalidArgument: if there is none.
    """
    total = len(spec.layers)
    wanted = range(max(0, total - _LAST), total) if layers is None else layers
    found = sorted({index + total if index < 0 else index for index in wanted})
    for index in found:
        if not 0 <= index < total:
            raise UnknownName("layer", str(index), map(str, range(total)))
    if not found:
        raise InvalidArgument("layers: expected at least one layer, or None for the last ten")
    return found


def sample_keys(
    reader: Reader,
    spec: ModelSpec,
    triplets: Iterable[Sequence[str]],
    layers: Sequence[int],
    prefix: Sequence[int] = (),
) -> Samples:
    """Returns the keys of the answers, from reading every triplet's context three times.

    The texts are those of the published code: ``Context: …``, and ``Question: …`` on a line before
    it.

    Args:
        reader: the model.
        spec: its facts.
        triplets: the texts.
        layers: layers to keep.
        prefix: token ids before each text, such as a BOS that the model is used to.

    Raises:
        InvalidArgument: if a context lacks its answer, or no triplet is left.
        ShapeMismatch: if the reader's model is not the one of ``spec``.
    """
    kept: list[list[dict[int, torch.Tensor]]] = [[], [], []]
    skipped = 0
    for given in triplets:
        one = Triplet(*given)
        places = [_place(reader, one, question) for question in ("", one.relevant, one.irrelevant)]
        answers = {tuple(ids[start:stop]) for ids, start, stop in places}
        if len(answers) != 1 or not all(answers):
            skipped += 1
            continue
        for rows, (ids, start, stop) in zip(kept, places, strict=True):
            tokens = torch.tensor([*prefix, *ids], dtype=torch.int64)
            found = reader.read(None, tokens, ("keys_pre",))["keys_pre"]
            span = slice(len(prefix) + start, len(prefix) + stop)
            rows.append({layer: _keys(found[layer], spec, layer, span) for layer in layers})
    if not kept[0]:
        raise InvalidArgument(
            f"expected at least one triplet whose answer has the same tokens in all three texts; "
            f"{skipped} had not"
        )
    alone, relevant, irrelevant = (
        {i: torch.cat([row[i] for row in rows], dim=1) for i in layers} for rows in kept
    )
    return Samples(alone, relevant, irrelevant, skipped)


def _keys(found: torch.Tensor, spec: ModelSpec, layer: int, span: slice) -> torch.Tensor:
    facts = spec.layers[layer]
    expect_axes(
        f"layer {layer} keys", found, "batch kv_head token dim",
        kv_head=facts.kv_heads, dim=facts.key_dim,
    )  # fmt: skip
    return found[0, :, span].detach().to("cpu", torch.float64)


def _place(reader: Reader, triplet: Triplet, question: str) -> tuple[list[int], int, int]:
    """Returns the token ids of a text and the range of the answer in them."""
    lead = f"Question: {question}\nContext: " if question else "Context: "
    start = triplet.context.find(triplet.answer) if triplet.answer else -1
    if start < 0:
        raise InvalidArgument(
            f"expected the answer {triplet.answer!r} in its context, word by word; found "
            f"{triplet.context!r}"
        )
    text, first = lead + triplet.context, len(lead) + start
    ids = reader.encode(text).tolist()
    # A token that the answer shares with what stands before or behind it is told by the beginning
    # that both spellings have in common: the one before counts to the answer, the one behind not.
    begins = [reader.encode(text[:end]).tolist() for end in (first, first + len(triplet.answer))]
    return ids, _shared(ids, begins[0]), _shared(ids, begins[1])


def _shared(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
