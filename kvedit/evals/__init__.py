"""Evals: what a memory or an edit does to a model's behaviour, with its uncertainty."""

from __future__ import annotations

import importlib
from typing import Any

# Not lazy: its module has the same name, and would take its place when it is imported.
from kvedit.evals.divergence import Divergence, ProbeResult, divergence, token_divergence

_LAZY = {
    "Asker": "steering",
    "Baselines": "steering",
    "Bystanders": "steering",
    "CalibratedStrength": "steering",
    "Conflict": "conflicts",
    "Difference": "bootstrap",
    "EqualKL": "strength",
    "METRICS": "results",
    "Markers": "steering",
    "Mean": "bootstrap",
    "Method": "steering",
    "Point": "frontier",
    "Prefills": "prefills",
    "Report": "report",
    "Rule": "checks",
    "StyleReport": "steering",
    "Task": "tasks",
    "TaskReport": "answering",
    "at_equal_kl": "strength",
    "by_editor": "evaluating",
    "calibrate_strength": "steering",
    "capitals": "conflict_library",
    "difference": "report",
    "evaluate": "evaluating",
    "evaluate_style": "steering",
    "evaluate_tasks": "answering",
    "fact_conflicts": "conflict_library",
    "few_shot": "baselines",
    "frontier_points": "frontier",
    "instruction_tasks": "instructions",
    "mark": "baselines",
    "needle_tasks": "needles",
    "ngram_entropy": "fluency",
    "paired_difference": "bootstrap",
    "pareto": "frontier",
    "random_like": "steering",
    "read_counterfact": "readers",
    "read_known_facts": "readers",
    "read_squad": "qa",
    "repeat_span": "baselines",
    "task_difference": "answering",
    "unedited": "evaluating",
    "unrelated_prompts": "steering",
}

__all__ = ["Divergence", "ProbeResult", "divergence", "token_divergence", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"kvedit.evals.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'kvedit.evals' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
