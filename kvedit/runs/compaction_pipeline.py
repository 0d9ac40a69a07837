"""The pipeline of compaction: an editor's smaller memory beside baselines, and one to serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvedit.editors import REGISTRY
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.runs import sections, steps
from kvedit.runs.asking import Asked, read_recall
from kvedit.runs.material import Material, read_material
from kvedit.runs.recall_report import RecallRun
from kvedit.runs.recalling import NOTHING, TRUNCATION, Recalling, sized, truncated
from kvedit.runs.stage import Say, Stage, perform
from kvedit.runs.targets import fill

__all__ = ["Plan", "plan", "run"]

SECTIONS = ("compaction", "editor", "recall")
_SERVABLE = "servable"


@dataclass(frozen=True)
class Plan:
    """A config that was checked.

    Args:
        config: the config.
        material: what the memory is of.
        name: the editor's name.
        editors: name in the table to editor; the first one is what the run is about.
        asked: what memories are asked.
    """

    config: Mapping[str, Any]
    material: Material
    name: str
    editors: Mapping[str, Any]
    asked: Asked


def plan(config: Mapping[str, Any]) -> Plan:
    """Returns a checked config; see :func:`kvedit.runs.pipelines.plan`."""
    sections.check_known(config, SECTIONS)
    if not config.get("editor"):
        raise InvalidArgument(
            f"nothing to do: choose an editor (editor=..., of {', '.join(REGISTRY)})"
        )
    sections.check_shared(config, SECTIONS)
    material = fill("document", read_material, config["document"])
    name, editor = config["editor"]["editor"], sections.build_editor(config["editor"])
    others = fill("compaction", _compaction, config["compaction"], name, editor)
    asked = fill("recall", read_recall, config["recall"])
    return Plan(config, material, name, {name: editor, **others}, asked)


def run(config: Mapping[str, Any], folder: Path, say: Say = print) -> RecallRun:
    """Returns what compacted memories recall; see :func:`kvedit.runs.pipelines.run`."""
    checked = plan(config)
    return perform(config, folder, say, lambda stage: _report(checked, stage))


def _compaction(
    name: str, editor: Any, baselines: Sequence[Mapping[str, Any]] = (), servable: bool = False
) -> dict[str, Any]:
    """Returns the other editors of the section ``compaction``.

    Args:
        name: the editor's name.
        editor: the editor.
        baselines: editors that it is compared with.
        servable: whether its variant without bias is made and stored as well.

    Raises:
        InvalidArgument: if an editor comes twice, or there is no such variant.
    """
    found: dict[str, Any] = {}
    for place, section in enumerate(baselines):
        where = f"compaction.baselines[{place}]"
        built = sections.build_editor(section, where)
        if section["editor"] in (name, *found, TRUNCATION):
            raise InvalidArgument(f"{where}: {section['editor']} is there already")
        found[str(section["editor"])] = built
    if servable:
        if not hasattr(editor, "fold_bias"):
            raise InvalidArgument(
                f"compaction.servable: {name} has no fold_bias, which makes a variant without "
                "bias; set compaction.servable=false"
            )
        found[f"{name}, {_SERVABLE}"] = dataclasses.replace(editor, fold_bias=True)
    return found


def _report(checked: Plan, stage: Stage) -> RecallRun:
    run = Recalling.load(checked.config, checked.asked, stage)
    full = run.capture(checked.material.context(run.loaded.tokenizer))
    path = checked.config["store"]["path"]

    def edited(editor: Any) -> KVMemory:
        others = steps.operands(run.loaded, editor, path, stage.say)
        return steps.edit(run.loaded, full, editor, others)

    made = {
        name: stage.step(name, lambda editor=editor: edited(editor), sized)  # type: ignore[misc]
        for name, editor in checked.editors.items()
    }
    first = checked.name
    memories = {NOTHING: None, TRUNCATION: truncated(made[first], full), **made}
    found = run.compare(full, memories, TRUNCATION)
    kept = [run.keep(made[first], found, first)]
    plain = f"{first}, {_SERVABLE}"
    if plain in made:
        kept.append(run.keep(made[plain], found, plain, f"/{_SERVABLE}"))
    facts = {f"servable: {each.name}": "yes" if each.servable else "no" for each in kept}
    facts |= {f"seconds: {name}": f"{stage.seconds[name]:.1f}" for name in made}
    return run.report(made[first], full, found, tuple(kept), first, TRUNCATION, facts)
