"""kv.capture: prefill contexts and keep what attention will read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvedit.errors import ContextTooLong, InvalidArgument, UnknownName
from kvedit.memory import KVMemory, LayerKV, LayerSpec, Lineage, LineageNode, Source
from kvedit.memory.digest import canonical_json, digest_tensor
from kvedit.memory.lineage import environment
from kvedit.models.inspection import Inspection, inspect
from kvedit.runtime.attaching import open_session
from kvedit.runtime.grown import row_layers
from kvedit.runtime.session import Session
from kvedit.runtime.text import Context, encode, is_messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Estimate", "capture", "estimate"]


def capture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    context: Any,
    *,
    chunk: int = 4096,
    layers: Sequence[int] | None = None,
    window: Literal["whole", "windowed"] = "whole",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Any:
    """Returns the memory (:class:`KVMemory`) that the model has of a context; a list for several.

    Args:
        model: a decoder-only model in eval mode.
        tokenizer: its tokenizer; may be None for token ids.
        context: a text, chat messages or token ids; or a list of texts, of chats, or of id lists.
            BOS is added once where the tokenizer adds one.
        chunk: tokens per forward pass.
        layers: layers to keep; negative numbers count from the end. None keeps all. A memory
            of some layers can be looked at, not attached.
        window: ``"whole"`` keeps every slot of sliding-window layers, ``"windowed"`` only those
            that a token after the context can still see.
        device: where the memory goes; None leaves it on the model's device.
        dtype: dtype of keys and values; None keeps the model's.
        batch_size: contexts per forward pass.
        progress: whether to show a progress bar over tokens.

    Raises:
        InvalidArgument: if a context is empty or an option is out of range.
        ContextTooLong: if a context has more tokens than the model has positions.
        UnsupportedModel: if the model has a mechanism that is not understood.
    """
    if chunk < 1 or batch_size < 1:
        raise InvalidArgument(
            f"chunk and batch_size must be at least 1, found {chunk}, {batch_size}"
        )
    if window not in ("whole", "windowed"):
        raise InvalidArgument(f"window must be 'whole' or 'windowed', found {window!r}")
    several = _is_several(context)
    sources = [encode(tokenizer, one) for one in (context if several else [context])]
    found = inspect(model, tokenizer)
    kept = _kept_layers(found, layers)
    for source in sources:
        _check_length(found, len(source))
    parameters = {"layers": kept if layers is not None else None, "window": window}
    memories = []
    for batch in _progress(list(_batches(sources, batch_size)), progress):
        memories += _capture_batch(model, found, batch, chunk, kept, window, parameters)
    if device is not None or dtype is not None:
        memories = [memory.to(device, dtype) for memory in memories]
    return memories if several else memories[0]


def _is_several(context: Any) -> bool:
    if isinstance(context, str | torch.Tensor) or not isinstance(context, Sequence):
        return False
    return bool(context) and not is_messages(context) and not isinstance(context[0], int)


def _kept_layers(found: Inspection, layers: Sequence[int] | None) -> list[int]:
    total = len(found.spec.layers)
    wanted = [index + total if index < 0 else index for index in layers or range(total)]
    for index in wanted:
        if not 0 <= index < total:
            raise UnknownName("layer", str(index), map(str, range(total)))
    return sorted(set(wanted))


def _check_length(found: Inspection, tokens: int) -> None:
    limit = found.spec.max_position
    if limit is not None and tokens > limit:
        raise ContextTooLong(
            f"the context has {tokens} tokens, {found.spec.name} has {limit} positions: "
            "capture a shorter context, or several"
        )


def _batches(sources: list[Source], size: int) -> Iterator[list[Source]]:
    for start in range(0, len(sources), size):
        yield sources[start : start + size]


def _progress(batches: list[list[Source]], shown: bool) -> Any:
    if not shown:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, desc="capture", unit="batch", disable=None)


def _capture_batch(
    model: PreTrainedModel,
    found: Inspection,
    sources: list[Source],
    chunk: int,
    kept: list[int],
    window: str,
    parameters: dict[str, Any],
) -> list[KVMemory]:
    longest = max(map(len, sources))
    ids = torch.zeros(len(sources), longest, dtype=torch.int64)
    valid = torch.zeros(len(sources), longest, dtype=torch.bool)
    for row, source in enumerate(sources):
        # Padding stands on the right: nothing before it can see it, so positions stay natural.
        ids[row, : len(source)] = source.tokens
        valid[row, : len(source)] = True
    with open_session(model, found, [None] * len(sources), None, strict=True) as session:
        session.cache.reserve(longest)
        for start in range(0, longest, piece_size(found, longest, chunk)):
            stop = start + piece_size(found, longest, chunk)
            session.forward(ids[:, start:stop], valid[:, start:stop], keep=1)
        return [
            _memory(session, row, source, kept, window, parameters, chunk)
            for row, source in enumerate(sources)
        ]


def piece_size(found: Inspection, tokens: int, chunk: int) -> int:
    """Returns how many of ``tokens`` may pass the model at once, ``chunk`` at most if it can be."""
    # Types that change frequencies with length need one pass once the change lies in the context.
    switches = [spec.rope.switch for spec in found.spec.layers if spec.rope and spec.rope.switch]
    return tokens if any(tokens > switch for switch in switches) else chunk


def _memory(
    session: Session,
    row: int,
    source: Source,
    kept: list[int],
    window: str,
    parameters: dict[str, Any],
    chunk: int,
) -> KVMemory:
    spec = session.inspection.spec_now()
    layers = row_layers(session, row, source, final=True)
    chosen = {index: layers[index] for index in kept}
    if window == "windowed":
        chosen = {i: _windowed(layer, spec.layers[i], len(source)) for i, layer in chosen.items()}
    identity = {"tokens": digest_tensor(source.tokens), "model": spec.identity()["fingerprint"]}
    node = LineageNode(
        operation="capture",
        name="capture",
        version=1,
        parameters=canonical_json({**identity, **parameters}).decode(),
        reproducibility="reader",
        environment=tuple(sorted((*environment(session.model.dtype), ("chunk", str(chunk))))),
    )
    return KVMemory(chosen, spec, len(source), source, Lineage((node,)))


def _windowed(layer: LayerKV, spec: LayerSpec, next_position: int) -> LayerKV:
    if spec.window is None:
        return layer
    if spec.kind == "chunked":
        first = next_position // spec.window * spec.window
    else:
        first = next_position - spec.window + 1
    return layer.select(layer.positions >= first)


@dataclass(frozen=True)
class Estimate:
    """What a capture would take.

    Args:
        tokens: tokens of the context.
        bytes: bytes of keys and values in the model's dtype.
        seconds: time of the prefill on this machine, from two short measured ones.
    """

    tokens: int
    bytes: int
    seconds: float


def estimate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, context: Context
) -> Estimate:
    """Returns how many bytes and seconds a capture of ``context`` would take, roughly.

    Two prefills of at most 64 and 256 tokens are timed; time grows by a part that is linear in
    tokens and, through attention, one that is quadratic, which is scaled by its share of
    multiplications.
    """
    source = encode(tokenizer, context)
    found = inspect(model, tokenizer)
    tokens = len(source)
    size = found.spec.bytes_per_token(torch.empty((), dtype=model.dtype).element_size())
    probe = min(tokens, 256)
    per_token = min(_timed(model, found, source, probe) for _ in range(2)) / probe
    weights = sum(parameter.numel() for parameter in model.parameters())
    attention = sum(spec.query_heads * spec.key_dim for spec in found.spec.layers)
    growth = (weights + attention * tokens) / (weights + attention * probe)
    return Estimate(tokens, size * tokens, per_token * tokens * growth)


def _timed(model: PreTrainedModel, found: Inspection, source: Source, tokens: int) -> float:
    short = replace(source, tokens=source.tokens[:tokens], offsets=source.offsets[:tokens])
    started = time.perf_counter()
    _capture_batch(model, found, [short], tokens, [0], "whole", {})
    return time.perf_counter() - started
