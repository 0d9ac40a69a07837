"""Parsing: what goes wrong where a stranger's JSON is not what it should be."""

from __future__ import annotations

__all__ = ["SHAPE_ERRORS"]

SHAPE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""Errors of looking for something in plain data that is not there, or is something else."""
