"""Chunked: what of a memory LMCache can hold.

LMCache keeps chunks of so many tokens. What a chunk is called is made from the token ids up to its
end, so only a memory that has one slot per token, from position 0 on, can be found again; and what
is beyond the last whole chunk is computed by the engine, from its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.serving.slots import Served, served

__all__ = ["Chunked", "chunked"]

_COMPUTED = ("capture", "grow")


@dataclass(frozen=True, eq=False)
class Chunked:
    """A memory cut into whole chunks, and a tail.

    Args:
        plain: its keys and values.
        tokens: the id of every slot's token, those of the tail included.
        size: tokens of a chunk.
    """

    plain: Served
    tokens: tuple[int, ...]
    size: int

    @property
    def salt(self) -> str:
        """Content digest of the memory: other content, or another model, is never met under it."""
        return self.plain.digest

    @property
    def count(self) -> int:
        """Number of whole chunks."""
        return len(self.tokens) // self.size

    @property
    def slots(self) -> int:
        """Slots in whole chunks."""
        return self.count * self.size

    @property
    def tail(self) -> int:
        """Slots behind the last whole chunk."""
        return len(self.tokens) - self.slots

    def chunk(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values of a chunk, each ``[layer, head, token, dim]``, on the CPU."""
        part = slice(index * self.size, (index + 1) * self.size)
        keys = torch.stack([tensor[:, part] for tensor in self.plain.keys])
        values = torch.stack([tensor[:, part] for tensor in self.plain.values])
        return keys.cpu(), values.cpu()


def chunked(memory: KVMemory, size: int, recompute_tail: bool = False) -> Chunked:
    """Returns a memory as LMCache can hold it.

    Args:
        memory: the memory.
        size: tokens of a chunk, which the server says.
        recompute_tail: take it that the engine computes the tail of an edited memory itself.

    Raises:
        InvalidArgument: if its slots are not its tokens, or an edit would be lost.
        UnsupportedModel: if an engine that counts slots can't follow the model's layers.
        MutatedMemory: if its tensors were changed in place.
    """
    reasons = list(_beyond_tokens(memory, size))
    if reasons:
        raise InvalidArgument("LMCache can't hold this memory: " + "; ".join(reasons))
    plain = served(memory)
    tokens = tuple(memory.tokens.tolist()) if memory.tokens is not None else ()
    if plain.slots != len(tokens):
        raise InvalidArgument(
            f"LMCache can't hold this memory: its bias becomes {plain.slots} slots for "
            f"{len(tokens)} tokens, and chunks are named by tokens. Compile the bias into the keys"
        )
    cut = Chunked(plain, tokens, size)
    if cut.tail and not recompute_tail and _is_edited(memory):
        raise InvalidArgument(
            f"{cut.tail} of its {len(tokens)} tokens lie behind the last whole chunk of {size}. "
            "The engine computes them from their ids, over the exported ones: after an edit, "
            f"that is not what the memory holds. Use {cut.slots} or {cut.slots + size} tokens, "
            "serve it by kvedit serve, or say recompute_tail=True"
        )
    return cut


def _beyond_tokens(memory: KVMemory, size: int) -> Iterator[str]:
    count = memory.tokens_count
    if memory.source is None:
        yield (
            f"its {memory.slots} slots have no tokens (a cartridge), and chunks are named by "
            "token ids: serve it by kvedit serve"
        )
        return
    numbers = torch.arange(count)
    if any(not torch.equal(layer.source.cpu(), numbers) for layer in memory.layers.values()):
        yield (
            f"its {memory.slots} slots are not its {count} tokens, one each and in order (it was "
            "compacted or composed): the engine would compute what is missing. Use kvedit serve"
        )
        return
    if memory.next_position != count or any(
        not torch.equal(layer.positions.cpu(), numbers) for layer in memory.layers.values()
    ):
        yield (
            f"its positions are not 0 to {count - 1} with {count} next, and the engine counts "
            "from 0: move them back first (the Shift editor)"
        )
    if count < size:
        yield f"it has {count} tokens, less than a chunk of {size}"


def _is_edited(memory: KVMemory) -> bool:
    """Whether a slot may differ from what the model computes from the tokens."""
    steps = memory.lineage.nodes
    return not steps or any(step.operation not in _COMPUTED for step in steps)
