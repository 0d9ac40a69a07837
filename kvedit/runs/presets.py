"""Presets: the YAML files of a config group as plain data, for verbs that run without Hydra."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

__all__ = ["preset"]

_BASE = "default"


def preset(group: str, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an option of a group says, with changes of single values.

    Args:
        group: ``"study"`` or ``"train"``: groups whose options build on ``default``.
        name: the option.
        changes: nested values that are others; unknown keys are kept, for the reader to refuse.
    """
    from omegaconf import OmegaConf

    folder = files("kvedit.conf") / group
    parts: list[Any] = [
        OmegaConf.create((folder / f"{each}.yaml").read_text(encoding="utf-8"))
        for each in dict.fromkeys((_BASE, name))
    ]
    found: Any = OmegaConf.to_container(OmegaConf.merge(*parts, OmegaConf.create(dict(changes))))
    return {str(key): value for key, value in found.items() if key != "defaults"}
