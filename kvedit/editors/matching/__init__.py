"""Attention Matching: a memory's slots replaced by fewer that attend alike, in closed form."""

from kvedit.editors.matching.editor import AttentionMatching
from kvedit.editors.matching.matching import match, reference_queries
from kvedit.editors.matching.report import HeadMatch, MatchingReport, match_report

__all__ = [
    "AttentionMatching",
    "HeadMatch",
    "MatchingReport",
    "match",
    "match_report",
    "reference_queries",
]
