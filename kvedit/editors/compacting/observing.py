"""What observing tokens attend to: the last tokens of a context, or those of a prompt."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kvedit.editors.base import Reader
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV

__all__ = ["check_prompt", "observe_last", "observe_prompt", "observing_slots", "prompt_tokens"]

Weights = dict[int, torch.Tensor]
"""Layer to attention weights ``[query_head, query, slot]`` on the memory's slots."""


def observe_last(memory: KVMemory, layers: Iterable[int], reader: Reader, window: int) -> Weights:
    """Returns the attention of a context's last tokens, which read the memory without them.

    Over a captured memory these are the weights of the capture itself. Over an edited one they
    are of what the edit left. A slot of an observing token gets the weight of that token.

    Args:
        memory: a memory with tokens, whose last ones stand right before what follows.
        layers: layers that are wanted.
        reader: the model.
        window: how many tokens observe.

    Raises:
        InvalidArgument: if the memory's tokens can't observe.
    """
    tokens = _observable(memory, window)
    before, kept = {}, {}
    for index, layer in memory.layers.items():
        kept[index] = ~observing_slots(memory, layer, window)
        before[index] = layer.select(kept[index])
    base = memory.with_layers(before, next_position=memory.next_position - window)
    seen = reader.read(base, tokens, ("pattern",))["pattern"]
    found = {}
    for index in layers:
        layer, rest = memory.layers[index], kept[index].to(seen[index].device)
        pattern = seen[index][0]
        count = int(rest.sum())
        weights = pattern.new_zeros(*pattern.shape[:2], layer.slots)
        weights[:, :, rest] = pattern[:, :, :count]
        own = (layer.source.to(rest.device) - (memory.tokens_count - window))[~rest]
        weights[:, :, ~rest] = pattern[:, :, count + own]
        found[index] = weights.to(layer.keys.device)
    return found


def observe_prompt(
    memory: KVMemory, layers: Iterable[int], reader: Reader, prompt: str, last: int
) -> Weights:
    """Returns the attention of a prompt's last tokens, read behind the memory.

    Args:
        memory: the memory.
        layers: layers that are wanted.
        reader: the model.
        prompt: a text; it is read as it is, without a chat template.
        last: how many of its tokens observe; all if it has fewer.

    Raises:
        InvalidArgument: if the prompt has no tokens.
    """
    seen = reader.read(memory, prompt_tokens(reader, prompt), ("pattern",))["pattern"]
    return {
        index: seen[index][0, :, -last:, : layer.slots].to(layer.keys.device)
        for index, layer in ((index, memory.layers[index]) for index in layers)
    }


def observing_slots(memory: KVMemory, layer: LayerKV, window: int) -> torch.Tensor:
    """Returns which slots are of the memory's last ``window`` tokens, bool ``[slot]``."""
    return layer.source >= max(memory.tokens_count - window, 0)


def prompt_tokens(reader: Reader, prompt: str) -> torch.Tensor:
    """Returns the tokens ``[n]`` of a prompt.

    Raises:
        InvalidArgument: if it has none.
    """
    tokens = reader.encode(prompt)
    if not len(tokens):
        raise InvalidArgument(f"the prompt {prompt!r} has no tokens")
    return tokens


def check_prompt(prompt: object) -> None:
    """Raises InvalidArgument unless ``prompt`` is a text or None."""
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise InvalidArgument(f"prompt: expected a text, or null for none, found {prompt!r}")


def _observable(memory: KVMemory, window: int) -> torch.Tensor:
    count = memory.tokens_count
    if memory.tokens is None:
        raise InvalidArgument(
            "the last tokens of a context are read to see what they attend to, and this memory "
            "has none: give prompt="
        )
    if not window < count:
        raise InvalidArgument(
            f"{window} tokens are to observe those before them; this memory has {count} tokens"
        )
    first = memory.next_position - window
    for index, layer in memory.layers.items():
        late = observing_slots(memory, layer, window)
        placed = layer.source + (memory.next_position - count) == layer.positions
        if bool((late & ~placed).any()) or bool((~late & (layer.positions >= first)).any()):
            raise InvalidArgument(
                f"layer {index}: the last {window} tokens do not stand alone right before "
                f"position {memory.next_position} (slots were packed, moved or made by no token), "
                "so they can't be read again: give prompt="
            )
    return memory.tokens[-window:]
