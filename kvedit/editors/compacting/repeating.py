"""How much each slot is read while the model repeats its context: KVZip's scores.

Kim et al. 2025, arXiv 2505.23416, with the authors' reading of chunks: a chunk's pass is a softmax
over sinks, the chunk's own slots and the pass's own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvedit.editors.base import Reader
from kvedit.editors.compacting.candidates import slot_order
from kvedit.editors.compacting.knorm import wide
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV, LayerSpec, Source

__all__ = ["Repeat", "reconstruction_scores"]


@dataclass(frozen=True)
class Repeat:
    """How the model is asked to repeat its context.

    Args:
        chunk: tokens at once.
        overlap: tokens before a chunk that its instruction ends with.
        instruction: for the first chunk.
        continuation: for the others.
        suffix: between instruction and chunk.
    """

    chunk: int
    overlap: int
    instruction: str
    continuation: str
    suffix: str

    def passes(self, source: Source, reader: Reader) -> Iterator[tuple[range, torch.Tensor]]:
        """Yields which tokens a pass repeats, and the tokens ``[n]`` that it feeds.

        Leading tokens without text, such as BOS, are not repeated.
        """
        tokens = source.tokens.cpu()
        spelled = (source.offsets[:, 1] > source.offsets[:, 0]).nonzero()
        first = int(spelled[0]) if len(spelled) else 0
        suffix = reader.encode(self.suffix)
        for start in range(first, len(tokens), self.chunk):
            stop = min(start + self.chunk, len(tokens))
            if start == first:
                asked = [reader.encode(self.instruction)]
            else:
                before = tokens[max(first, start - self.overlap) : start]
                asked = [reader.encode(self.continuation), before]
            yield range(start, stop), torch.cat((*asked, suffix, tokens[start:stop]))


def reconstruction_scores(
    memory: KVMemory, layers: list[int], reader: Reader, asked: Repeat, sinks: int
) -> dict[int, torch.Tensor]:
    """Returns the highest attention to each slot in the passes, ``[kv_head, slot]`` per layer.

    The maximum is over a pass's tokens and the query heads of a KV head. Slots that no pass
    repeats, of tokens without text or of none, take part in every pass.

    Args:
        memory: a memory with tokens.
        layers: layers that are wanted.
        reader: the model.
        asked: chunks and instructions.
        sinks: first slots, which every softmax sees.

    Raises:
        InvalidArgument: if the memory has no tokens.
    """
    if memory.source is None:
        raise InvalidArgument("KVZip repeats the context's tokens, and this memory has none")
    scores = {
        index: wide(memory.layers[index].keys).new_zeros(memory.layers[index].keys.shape[:2])
        for index in layers
    }
    passes = list(asked.passes(memory.source, reader))
    first = passes[0][0].start
    for repeated, tokens in passes:
        seen = reader.read(memory, tokens, ("queries", "keys"))
        for index in layers:
            layer = memory.layers[index]
            inside = (layer.source >= repeated.start) & (layer.source < repeated.stop)
            orphan = layer.source < first
            sink = slot_order(layer).to(layer.source.device) < sinks
            judged = (inside | orphan).nonzero().squeeze(1)
            shown = (sink & ~inside & ~orphan).nonzero().squeeze(1)
            slots = torch.cat((judged, shown)).to(layer.keys.device)
            best = _highest(memory, index, slots, seen["queries"][index][0], seen["keys"][index][0])
            found = scores[index]
            now = best[:, : len(judged)].to(found.dtype)
            found[:, judged] = torch.maximum(found[:, judged], now)
    return scores


def _highest(
    memory: KVMemory, index: int, slots: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Returns the highest attention to ``slots``, ``[kv_head, len(slots)]``."""
    layer, spec = memory.layers[index], memory.model.layers[index]
    queries, keys = (wide(x).to(layer.keys.device) for x in (queries, keys))
    own = keys[:, layer.slots :]
    mask = _mask(memory, layer, spec, slots, own.shape[1]).to(queries)
    rows = []
    for head in range(layer.heads):  # one at a time: logits of a chunk are large
        group = slice(head * spec.group, (head + 1) * spec.group)
        read = torch.cat((layer.keys[head, slots].to(own.dtype), own[head]))
        logits = queries[group] @ read.T * spec.scale
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        logits = logits + mask
        if layer.bias is not None:
            logits[:, :, : len(slots)] += layer.bias[group][
                :, None, slots.to(layer.bias.device)
            ].to(logits)
        rows.append(logits.softmax(dim=-1)[:, :, : len(slots)].amax(dim=(0, 1)))
    return torch.stack(rows)


def _mask(
    memory: KVMemory, layer: LayerKV, spec: LayerSpec, slots: torch.Tensor, queries: int
) -> torch.Tensor:
    """Returns 0 where a token of the pass sees a slot or a token, else -inf ``[query, key]``."""
    mine = memory.next_position + torch.arange(queries)
    at = torch.cat((layer.positions.cpu()[slots.cpu()], mine))
    seen = at[None, :] <= mine[:, None]
    if spec.window is not None and spec.kind == "chunked":
        seen &= at[None, :] // spec.window == mine[:, None] // spec.window
    elif spec.window is not None:
        seen &= mine[:, None] - at[None, :] < spec.window
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
