"""Concat: several memories as one, behind each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvedit.editors.base import Editor, Reader
from kvedit.editors.shift import Shift
from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.memory import KVMemory, LayerKV, Message, ModelSpec, Source
from kvedit.memory.operand import operand_kind

__all__ = ["Concat"]


@dataclass(frozen=True)
class Concat(Editor):
    """Puts memories of one model behind each other: one context made of several.

    A later token attends to all of them. None of them has read another one: that is what a
    context that was read as a whole has over it. With one memory it changes nothing.

    Texts are joined, and spans resolve in all of them. If the last memory is a chat, the result
    keeps that chat and goes on with it; slots of the others then name no token.

    Args:
        rotate: whether each memory moves behind the one before it, keys re-rotated by each
            layer's RoPE, so that no two slots stand at one position. Without it keys stay as they
            are, one memory over the other; PEFT composes cartridges so.
        order: the places in which the given memories stand, as numbers of them; None keeps the
            order in which they are given.

    Raises:
        IncompatibleModel: if memories are of different models.
        InvalidArgument: if the order fits not the memories, or one has run-time rules, another
            dtype or missing layers.
        UnsupportedModel: for learned absolute positions, unless ``rotate`` is False.
        ContextTooLong: if positions would pass the model's limit, or a change of its RoPE.
    """

    # Memories that were read apart would come out different if they were read as one.
    rewrites: ClassVar[bool] = True

    rotate: bool = True
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks that the order names each place once."""
        if self.order is None:
            return
        order = tuple(self.order)
        if sorted(order) != list(range(len(order))):
            raise InvalidArgument(
                f"order: expected each number from 0 to {len(order) - 1} once, found {order}"
            )
        object.__setattr__(self, "order", order)

    def check_inputs(self, memories: tuple[KVMemory, ...]) -> None:
        """Checks that there are memories, of one model, that can stand together.

        Raises:
            InvalidArgument: if something is no memory, or they don't fit the order or each other.
            IncompatibleModel: if they are of different models.
        """
        found = [
            operand_kind(m) or "memory" if isinstance(m, KVMemory) else type(m).__name__
            for m in memories
        ]
        if not memories or any(kind != "memory" for kind in found):
            raise InvalidArgument(f"Concat joins memories, at least one, found {found}")
        if self.order is not None and len(self.order) != len(memories):
            raise InvalidArgument(
                f"order names {len(self.order)} memories, {len(memories)} were given"
            )
        for other in memories[1:]:
            _check_pair(memories[0], other)
        if len(memories) > 1 and any(memory.rules for memory in memories):
            raise InvalidArgument(
                "a memory has run-time rules, which name spans of it alone: concatenate first, "
                "then apply them"
            )

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the joined memory."""
        ordered = [memories[place] for place in self.order or range(len(memories))]
        if len(ordered) == 1:
            return ordered[0]
        moved, start = [], 0
        for memory in ordered:
            # Shift refuses what can't be moved: learned positions, limits, chunks.
            moved.append(Shift(start).edit(memory) if self.rotate and start else memory)
            start += memory.next_position
        source, offsets = _joined_source([memory.source for memory in moved])
        layers = {
            index: _joined_layer([memory.layers[index] for memory in moved], offsets)
            for index in ordered[0].layers
        }
        verified = all(memory.verified for memory in ordered)
        return dataclasses.replace(
            ordered[0], layers=layers, next_position=start, source=source, verified=verified
        )


def _check_pair(first: KVMemory, other: KVMemory) -> None:
    different = first.model.fingerprint.differences(other.model.fingerprint)
    if different or first.model.layers != other.model.layers:
        # What can be pictured first: digests say that models differ, and not how.
        reasons = _layout_reasons(first.model, other.model)
        reasons += [f"{name}: {a[:18]}, {b[:18]}" for name, (a, b) in different.items()]
        raise IncompatibleModel(
            f"memories of {first.model.name} and {other.model.name} can't stand together: "
            + ("; ".join(reasons) or "their layers or RoPE settings differ")
            + "; join memories that one model made"
        )
    if first.dtype != other.dtype:
        raise InvalidArgument(
            f"memories have dtypes {first.dtype} and {other.dtype}: bring them to one with "
            "memory.to(dtype=…)"
        )
    if set(first.layers) != set(other.layers):
        raise InvalidArgument(
            f"memories have layers {list(first.layers)} and {list(other.layers)}: all must have "
            "the same"
        )


def _layout_reasons(first: ModelSpec, other: ModelSpec) -> list[str]:
    """Returns the first difference of how many layers, heads and dims there are."""
    if len(first.layers) != len(other.layers):
        return [f"layers: {len(first.layers)}, {len(other.layers)}"]
    for index, (a, b) in enumerate(zip(first.layers, other.layers, strict=True)):
        for name in ("kv_heads", "query_heads", "key_dim", "value_dim"):
            if getattr(a, name) != getattr(b, name):
                return [f"layer {index} {name}: {getattr(a, name)}, {getattr(b, name)}"]
    return []


def _joined_source(sources: Sequence[Source | None]) -> tuple[Source | None, list[int | None]]:
    """Returns the joined source, and per memory by how much its token numbers move.

    None in place of a number: its tokens are not in the joined source.
    """
    last = sources[-1]
    if last is not None and last.chat is not None:
        # A template renders one conversation; two behind each other could not go on.
        return last, [*(None for _ in sources[:-1]), 0]
    known = [source for source in sources if source is not None]
    if not known:
        return None, [None for _ in sources]
    starts: list[int | None] = []
    texts, tokens = 0, 0
    offsets: list[torch.Tensor] = []
    messages: list[Message] = []
    for source in sources:
        starts.append(None if source is None else tokens)
        if source is None:
            continue
        offsets.append(source.offsets + texts)
        messages += [_moved(message, texts) for message in source.messages]
        texts, tokens = texts + len(source.text), tokens + len(source)
    joined = Source(
        tokens=torch.cat([source.tokens for source in known]),
        text="".join(source.text for source in known),
        offsets=torch.cat(offsets),
        messages=tuple(messages),
    )
    return joined, starts


def _moved(message: Message, by: int) -> Message:
    if message.start < 0:
        return message
    return dataclasses.replace(message, start=message.start + by, stop=message.stop + by)


def _joined_layer(layers: Sequence[LayerKV], offsets: Sequence[int | None]) -> LayerKV:
    device = layers[0].keys.device
    sources = [
        torch.full_like(layer.source, -1)
        if by is None
        else torch.where(layer.source < 0, layer.source, layer.source + by)
        for layer, by in zip(layers, offsets, strict=True)
    ]
    return LayerKV(
        keys=torch.cat([layer.keys.to(device) for layer in layers], dim=1),
        values=torch.cat([layer.values.to(device) for layer in layers], dim=1),
        positions=torch.cat([layer.positions for layer in layers]),
        source=torch.cat(sources),
        bias=_joined_bias(layers),
    )


def _joined_bias(layers: Sequence[LayerKV]) -> torch.Tensor | None:
    known = [layer.bias for layer in layers if layer.bias is not None]
    if not known:
        return None
    heads = known[0].shape[0]
    none = [known[0].new_zeros(heads, layer.slots) for layer in layers]
    pieces = [
        zeros if layer.bias is None else layer.bias.to(zeros)
        for layer, zeros in zip(layers, none, strict=True)
    ]
    return torch.cat(pieces, dim=1)
