"""What keeps a memory from being written as plain keys and values, each with the way out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.memory import KVMemory, LayerKV, LayerSpec
from kvedit.memory.operand import operand_kind

__all__ = ["check_plain"]


def check_plain(memory: KVMemory) -> None:
    """Raises unless plain keys and values, counted by slot, do what the memory does.

    Raises:
        InvalidArgument: with every reason and what to do about it.
        UnsupportedModel: if its positions would have to move and can't.
    """
    reasons = [*_shape(memory), *_beyond_keys(memory)]
    if not reasons:
        _check_move(memory)
        reasons = list(_windows(memory))
    if reasons:
        raise InvalidArgument(
            "this memory can't be written as plain keys and values: " + "; ".join(reasons)
        )


def _shape(memory: KVMemory) -> Iterator[str]:
    if not memory.complete:
        yield (
            f"it has layers {list(memory.layers)} of {len(memory.model.layers)}: capture all layers"
        )
    counts = {index: layer.slots for index, layer in memory.layers.items()}
    if len(set(counts.values())) > 1:
        most = max(counts.values())
        short = {index: slots for index, slots in counts.items() if slots < most}
        slides = any(memory.model.layers[index].window for index in short)
        way = "capture with window='whole', and " if slides else ""
        yield (
            f"layers differ in slots ({_listed(short)} of {most}), and the format has one number "
            f"for all: {way}keep the same number of slots in every layer"
        )
    elif not memory.slots:
        yield "it has no slots: the format needs one at least"
    shapes = {
        (spec.kv_heads, spec.key_dim, spec.value_dim)
        for spec in (memory.model.layers[index] for index in memory.layers)
    }
    if len(shapes) > 1 or any(key != value for _, key, value in shapes):
        yield (
            "the format has one number of KV heads and one head size for keys and values of all "
            f"layers; this model has {sorted(shapes)} (KV heads, key size, value size)"
        )


def _beyond_keys(memory: KVMemory) -> Iterator[str]:
    biases = [layer.bias for layer in memory.layers.values() if layer.bias is not None]
    if any(bool(bias.isneginf().any()) for bias in biases):
        yield (
            "some heads lack slots (a bias of -inf), which the format can't say: drop them in "
            "all heads, or let each head's own slots stand side by side (packed layout)"
        )
    elif any(bool(bias.any()) for bias in biases):
        yield (
            "it has attention bias, which the format can't say: run the Compile editor first, or "
            "let values be fitted for none (refit=, or AttentionMatching with fold_bias=True)"
        )
    if (kind := operand_kind(memory)) is not None:
        yield f"it is an operand of editors ({kind}), no context"
    elif memory.rules:
        names = [str(rule.get("rule")) for rule in memory.rules if isinstance(rule, dict)]
        yield (
            f"it has run-time rules ({', '.join(names) or len(memory.rules)}), which only kvedit's "
            "runtime applies: edit without them"
        )


def _check_move(memory: KVMemory) -> None:
    moved = memory.slots - memory.next_position
    if moved == 0:
        return
    where = f"from position {memory.next_position} to {memory.slots}"
    spec = memory.model
    if spec.positions == "learned":
        raise UnsupportedModel(
            f"{spec.name} has learned absolute positions, mixed into keys and values: its memory "
            f"can't be moved {where}. Export it before slots are dropped"
        )
    for index, layer in enumerate(spec.layers):
        if layer.kind == "chunked":
            raise UnsupportedModel(
                f"layer {index} of {spec.name} attends in chunks of {layer.window} positions, "
                f"which a memory moved {where} would be cut at other places by"
            )
        switch = layer.rope.switch if layer.rope else None
        if switch is not None and max(memory.next_position, memory.slots) > switch:
            raise UnsupportedModel(
                f"{layer.rope.kind if layer.rope else ''} RoPE of {spec.name} changes its "
                f"frequencies at position {switch}: its memory can't be moved {where}"
            )


def _windows(memory: KVMemory) -> Iterator[str]:
    for index, layer in memory.layers.items():
        spec = memory.model.layers[index]
        if spec.window is None or _same_view(layer, spec, memory.next_position):
            continue
        yield (
            f"layer {index} sees {spec.window} positions, counted by slot in the format and by "
            "position here, which is not the same after slots were dropped near the end: move the "
            "kept slots together (rerotate=True of the compacting editors), or keep the last "
            f"{spec.window} tokens whole"
        )
        return


def _same_view(layer: LayerKV, spec: LayerSpec, next_position: int) -> bool:
    """Returns whether every later query sees the same slots by slot number as by position."""
    window = spec.window or 0
    numbers = torch.arange(layer.slots)
    positions = layer.positions.cpu()
    if spec.kind == "chunked":
        here = positions // window == next_position // window
        return bool((here == (numbers // window == layer.slots // window)).all())
    # A slot that is a window or more away is never seen again, however far it is.
    far = (next_position - positions).clamp_max(window)
    return bool((far == (layer.slots - numbers).clamp_max(window)).all())


def _listed(slots: dict[int, int]) -> str:
    shown = [f"layer {index}: {count}" for index, count in list(slots.items())[:4]]
    return ", ".join(shown) + (", …" if len(slots) > 4 else "")
