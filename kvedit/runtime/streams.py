"""attention_streams: the hidden states that each layer's attention takes and returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kvedit.errors import UnsupportedModel
from kvedit.models.inspection import Inspection

__all__ = ["STREAMS", "Streams", "attention_streams"]

STREAMS: Mapping[str, int] = {"attention_input": 0, "attention_output": 1}
"""Names of the streams, and where each stands in a layer's pair."""

Streams = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Layer to attention's input and output ``[batch, query, hidden]``, of the last pass."""


@contextmanager
def attention_streams(found: Inspection) -> Iterator[Streams]:
    """Notes what attention takes and returns in every forward pass within the block.

    The input is what the layer's norm made of the stream, the output what is added to it, so a
    change in one layer is seen in all that come later.

    Args:
        found: the model's facts.

    Yields:
        The streams; they stay when the block ends.

    Raises:
        UnsupportedModel: from the pass, if an attention module has no hidden state there.
    """
    streams: Streams = {}
    handles = [
        found.attention[layer].register_forward_hook(_keeper(streams, layer), with_kwargs=True)
        for layer in range(len(found.spec.layers))
    ]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def _keeper(streams: Streams, layer: int) -> Any:
    def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entered = kwargs.get("hidden_states", args[0] if args else None)
        left = output[0] if isinstance(output, tuple) else output
        if not isinstance(entered, torch.Tensor) or not isinstance(left, torch.Tensor):
            raise UnsupportedModel(f"layer {layer}: attention takes or returns no hidden state")
        streams[layer] = (entered.detach().clone(), left.detach().clone())

    return hook
