"""Pick the vectors of chosen tokens out of a forward pass, and nothing else of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import UnsupportedModel
from kvedit.memory import RopeSpec
from kvedit.models.inspection import Inspection
from kvedit.models.rope import unrotate
from kvedit.runtime.tapping import tap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Picked", "pick"]

Picked = dict[str, dict[int, torch.Tensor]]
"""Site to layer to ``[row, kv_head, dim]`` or ``[row, hidden]``, float32 on the CPU."""

_TAPPED = {"keys": "keys", "values": "values", "residual": "hidden"}


def pick(
    model: PreTrainedModel,
    found: Inspection,
    rows: Sequence[torch.Tensor],
    places: Sequence[torch.Tensor],
    sites: Sequence[str],
    layers: Sequence[int],
) -> Picked:
    """Returns vectors of one batch, each the mean over a row's chosen tokens.

    Rows are padded on the right, so token i of a row stands at position i, and what stands behind
    it is seen by no token. Only the chosen tokens are kept: a pass over long rows needs no room
    for all vectors of all layers.

    Args:
        model: the model.
        found: its facts.
        rows: token ids ``[token]`` of each row.
        places: indices ``[chosen]`` of the tokens that are read in each row.
        sites: sites of a delta.
        layers: layers to keep.
    """
    seen: Picked = {site: {} for site in sites}
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "position_ids": (real.long().cumsum(dim=1) - 1).clamp_min(0),
    }
    arguments = {name: tensor.to(model.device) for name, tensor in arguments.items()}
    if "logits_to_keep" in signature(model.forward).parameters:
        arguments["logits_to_keep"] = 1
    with _watching(model, found, seen, places, layers), torch.no_grad():
        model(**arguments, use_cache=False)
    return seen


@contextmanager
def _watching(
    model: PreTrainedModel,
    found: Inspection,
    seen: Picked,
    places: Sequence[torch.Tensor],
    layers: Sequence[int],
) -> Iterator[None]:
    def keep(site: str) -> Any:
        def look(layer: int, tensor: torch.Tensor) -> torch.Tensor:
            # The rotation of this very pass: some types change it with the length.
            rope = found.spec_now().layers[layer].rope
            seen[site][layer] = _chosen(site, tensor, rope, places)
            return tensor

        return look

    watched = {_TAPPED[site]: keep(site) for site in seen if site in _TAPPED}
    with ExitStack() as stack:
        if watched:
            stack.enter_context(tap(model, layers=layers, replace=watched))
        if "attention" in seen:
            look = keep("attention")
            for layer in layers:
                handle = found.attention[layer].register_forward_hook(_attention(layer, look))
                stack.callback(handle.remove)
        yield


def _attention(layer: int, look: Any) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        left = output[0] if isinstance(output, tuple) else output
        if not isinstance(left, torch.Tensor) or left.ndim != 3:
            raise UnsupportedModel(f"layer {layer}: attention returns no hidden state")
        look(layer, left)

    return hook


def _chosen(
    site: str, tensor: torch.Tensor, rope: RopeSpec | None, places: Sequence[torch.Tensor]
) -> torch.Tensor:
    rows = []
    for row, at in enumerate(places):
        index = at.to(tensor.device)
        if site in ("keys", "values"):
            # After RoPE here; each key is turned back by its own position, then they are averaged.
            states = tensor[row][:, index].detach().float()
            if site == "keys":
                states = unrotate(states, rope, index)
            rows.append(states.mean(dim=1))
        else:
            rows.append(tensor[row][index].detach().float().mean(dim=0))
    return torch.stack(rows).cpu()
