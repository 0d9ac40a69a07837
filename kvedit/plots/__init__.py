"""Plots: functions that return a matplotlib Figure and never show it."""

from kvedit.plots.atlas import head_atlas
from kvedit.plots.attention import received, token_labels
from kvedit.plots.deltas import delta_norms
from kvedit.plots.differences import comparison
from kvedit.plots.frontier import frontier
from kvedit.plots.grid import heatmap
from kvedit.plots.recall import recall_curves
from kvedit.plots.sizes import norms
from kvedit.plots.strengths import strength_map

__all__ = [
    "comparison",
    "delta_norms",
    "frontier",
    "head_atlas",
    "heatmap",
    "norms",
    "recall_curves",
    "received",
    "strength_map",
    "token_labels",
]
