"""match and reference_queries: matching as functions, with what an editor alone keeps to itself."""

from __future__ import annotations

import torch

from kvedit.editors.base import Reader
from kvedit.editors.matching.editor import AttentionMatching
from kvedit.editors.matching.layers import chosen_layers
from kvedit.editors.matching.queries import collect
from kvedit.editors.matching.report import MatchingReport
from kvedit.memory import KVMemory

__all__ = ["match", "reference_queries"]


def match(
    memory: KVMemory, editor: AttentionMatching, reader: Reader | None, *operands: KVMemory
) -> tuple[KVMemory, MatchingReport]:
    """Returns the memory that ``editor(memory, *operands, reader=reader)`` makes, and its report.

    Figures are of queries from the editor's own source that no fit has seen, an eighth of them.
    For queries of another source see :func:`reference_queries` and
    :func:`~kvedit.editors.matching.report.match_report`.

    Args:
        memory: the memory.
        editor: how it is matched.
        reader: the model; None where the queries need none.
        *operands: a calibration's queries, for ``queries="calibrated"``.
    """
    return editor.match(memory, *operands, reader=reader)


def reference_queries(
    memory: KVMemory, editor: AttentionMatching, reader: Reader | None, *operands: KVMemory
) -> dict[int, torch.Tensor]:
    """Returns all queries that an editor's source gives over a memory, off policy.

    Args:
        memory: the memory that they are read over.
        editor: names source, prompts and layers.
        reader: the model; None where the queries need none.
        *operands: a calibration's queries, for ``queries="calibrated"``.

    Returns:
        Layer to ``[query_head, token, dim]``, after RoPE.
    """
    operand = operands[0] if operands else None
    layers = chosen_layers(memory, editor)
    return dict(collect(memory, editor, layers, reader=reader, operand=operand).layers)
