"""How a memory shows itself to people: a short text and an HTML table."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvedit.memory.memory import KVMemory

__all__ = ["describe", "describe_html", "facts", "human_bytes"]


def human_bytes(size: float) -> str:
    """Returns a byte count in the largest binary unit that keeps it at or above one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def facts(memory: KVMemory) -> dict[str, str]:
    """Returns what one wants to know of a memory at a glance, as label to text."""
    counts = [layer.slots for layer in memory.layers.values()]
    slots = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    biased = [index for index, layer in memory.layers.items() if layer.bias is not None]
    dtype = str(memory.dtype).removeprefix("torch.")
    found = {
        "model": f"{memory.model.name} ({memory.model.family})",
        "layers": f"{len(memory.layers)} of {len(memory.model.layers)}",
        "slots": slots,
        "tokens": str(memory.tokens_count),
        "next position": str(memory.next_position),
        "size": f"{human_bytes(memory.nbytes)}, {dtype}, {memory.device}",
    }
    if biased:
        found["bias"] = f"in {len(biased)} layers"
    if memory.source and memory.source.chat:
        found["chat"] = ", ".join(message.role for message in memory.source.messages)
    if memory.source:
        found["text"] = _shortened(memory.source.text)
    if memory.lineage.nodes:
        found["made by"] = " → ".join(node.name for node in memory.lineage.nodes)
    if not memory.verified:
        found["warning"] = "read without checking its bytes"
    return {label: _printable(value) for label, value in found.items()}


def _shortened(text: str) -> str:
    return text if len(text) <= 72 else f"{text[:71]}…"


def _printable(text: str) -> str:
    # A memory may come from anywhere: no escape sequences or direction marks reach a terminal.
    spaced = (" " if char.isspace() else char for char in text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in spaced)


def describe(memory: KVMemory) -> str:
    """Returns the facts as text."""
    rows = (f"  {label}: {value}" for label, value in facts(memory).items())
    return "KVMemory\n" + "\n".join(rows)


def describe_html(memory: KVMemory) -> str:
    """Returns the facts as an HTML table; everything from the memory is escaped."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for label, value in facts(memory).items()
    )
    return f"<table><caption>KVMemory</caption>{rows}</table>"
