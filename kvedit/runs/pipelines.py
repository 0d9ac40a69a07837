"""The pipelines by name: what ``pipeline`` in a config may be."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvedit.errors import UnknownName
from kvedit.runs.stage import Findings, Say

__all__ = ["PIPELINES", "plan", "run"]

PIPELINES: Mapping[str, str] = {
    "edit": "pipeline",
    "study": "study_pipeline",
    "cartridge": "cartridge_pipeline",
    "compaction": "compaction_pipeline",
    "composition": "composition_pipeline",
    "steering": "steering_pipeline",
    "cast": "cast_pipeline",
    "serve": "serve_pipeline",
}
"""Name to the module of :mod:`kvedit.runs` that has its ``plan`` and ``run``."""


def plan(config: Mapping[str, Any]) -> Any:
    """Returns a checked config; nothing was loaded or written yet.

    Raises:
        InvalidArgument: if a value is missing or out of range, or something is to be instantiated.
        UnknownName: if a pipeline, a key or an editor does not exist.
    """
    return _module(config).plan(config)


def run(config: Mapping[str, Any], folder: Path, say: Say = print) -> Findings:
    """Returns what a run found.

    Args:
        config: plain data with the sections of ``kvedit/conf/run.yaml``, and the pipeline's own.
        folder: the run's folder: ``results.json``, and what the tracker writes.
        say: takes progress, line by line.

    Raises:
        KVEditError: if something is refused.
    """
    found: Findings = _module(config).run(config, folder, say)
    return found


def _module(config: Mapping[str, Any]) -> Any:
    name = config.get("pipeline", "edit")
    if name not in PIPELINES:
        raise UnknownName("pipeline", str(name), PIPELINES)
    return importlib.import_module(f"kvedit.runs.{PIPELINES[name]}")
