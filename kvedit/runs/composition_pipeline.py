"""The pipeline of composition: memories of several texts in one, in every order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvedit.cartridges import compose
from kvedit.errors import InvalidArgument
from kvedit.evals.recall import Composition, composition
from kvedit.memory import KVMemory
from kvedit.runs import sections, steps
from kvedit.runs.asking import Asked, read_recall
from kvedit.runs.material import Material, read_material
from kvedit.runs.recall_report import RecallRun
from kvedit.runs.recalling import NOTHING, Recalling, sized
from kvedit.runs.stage import Say, Stage, perform
from kvedit.runs.targets import fill

__all__ = ["Part", "Plan", "plan", "run"]

SECTIONS = ("parts", "composition", "recall")
_OPTIONAL = ("editor",)


@dataclass(frozen=True)
class Part:
    """One text of a composition.

    Args:
        material: the text.
        ref: a stored memory of it, such as a cartridge; None captures it anew.
    """

    material: Material
    ref: str | None


@dataclass(frozen=True)
class Plan:
    """A config that was checked.

    Args:
        config: the config.
        parts: name to part, in the order in which they stand.
        editor: what each captured part is edited by, or None.
        rotate: whether parts stand behind each other by RoPE.
        most_orders: orders that are tried at most.
        asked: what memories are asked.
    """

    config: Mapping[str, Any]
    parts: Mapping[str, Part]
    editor: Any
    rotate: bool
    most_orders: int
    asked: Asked


def plan(config: Mapping[str, Any]) -> Plan:
    """Returns a checked config; see :func:`kvedit.runs.pipelines.plan`."""
    sections.check_known(config, (*SECTIONS, *_OPTIONAL))
    sections.check_shared(config, SECTIONS)
    parts = _parts(config["parts"])
    rotate, most = fill("composition", _composition, config["composition"])
    editor = sections.build_editor(config["editor"]) if config.get("editor") else None
    asked = fill("recall", read_recall, config["recall"])
    about = {document for _, _, document in asked.pairs}
    if about != set(parts):
        raise InvalidArgument(
            f"recall.questions: each needs the part that it is about as document, and each part "
            f"a question; parts are {sorted(parts)}, found {sorted(about)}"
        )
    return Plan(config, parts, editor, rotate, most, asked)


def run(config: Mapping[str, Any], folder: Path, say: Say = print) -> RecallRun:
    """Returns what a composed memory recalls; see :func:`kvedit.runs.pipelines.run`."""
    checked = plan(config)
    return perform(config, folder, say, lambda stage: _report(checked, stage))


def _parts(section: Any) -> dict[str, Part]:
    if not isinstance(section, Mapping) or len(section) < 2:
        raise InvalidArgument(f"parts: expected two named texts at least, found {section!r}")
    found = {}
    for name, given in section.items():
        if not isinstance(given, Mapping):
            raise InvalidArgument(f"parts.{name}: expected keys and values, found {given!r}")
        values = dict(given)
        ref = values.pop("ref", None)
        found[str(name)] = Part(fill(f"parts.{name}", read_material, values), ref)
    return found


def _composition(rotate: bool = True, most_orders: int = 6) -> tuple[bool, int]:
    """Names the keys of the section ``composition``."""
    if most_orders < 2:
        raise InvalidArgument(f"composition.most_orders: expected 2 or more, found {most_orders}")
    return rotate, most_orders


def _report(checked: Plan, stage: Stage) -> RecallRun:
    run = Recalling.load(checked.config, checked.asked, stage)
    context = _whole(checked.parts)
    full = run.capture(context.context(run.loaded.tokenizer))
    parts = {name: _memory(checked, name, run) for name in checked.parts}

    def joined(memories: Sequence[KVMemory]) -> KVMemory:
        one: KVMemory = compose(memories, rotate=checked.rotate)
        return one

    made = stage.step("compose", lambda: joined(list(parts.values())), sized)
    first, model, tokenizer = " + ".join(parts), run.loaded.model, run.loaded.tokenizer
    found = stage.step(
        "recall",
        lambda: composition(
            model, tokenizer, parts, joined, checked.asked.questions(full), full=full,
            others={NOTHING: None}, most_orders=checked.most_orders, baseline=NOTHING,
            **checked.asked.options(full),
        ),
        _spread,
    )  # fmt: skip
    kept = (run.keep(made, found.report, first),)
    return run.report(made, full, found.report, kept, first, NOTHING, _facts(found))


def _whole(parts: Mapping[str, Part]) -> Material:
    """Returns all texts as one, in the first part's words: what one prompt would hold."""
    from kvedit.cartridges.study import Corpus, Document

    first = next(iter(parts.values())).material
    documents = [
        Document(f"{name}: {document.title}", document.text)
        for name, part in parts.items()
        for document in part.material.corpus
    ]
    return Material(Corpus(tuple(documents)), first.intro, first.chat)


def _memory(checked: Plan, name: str, run: Recalling) -> KVMemory:
    part, path = checked.parts[name], checked.config["store"]["path"]
    captured = run.capture(part.material.context(run.loaded.tokenizer), f"capture/{name}")
    if part.ref is not None:
        return _stored(path, part.ref, captured, name)
    if checked.editor is None:
        return captured
    others = steps.operands(run.loaded, checked.editor, path, run.stage.say)
    return run.stage.step(
        f"edit/{name}", lambda: steps.edit(run.loaded, captured, checked.editor, others), sized
    )


def _stored(path: str, ref: str, captured: KVMemory, name: str) -> KVMemory:
    found = sections.get(path, ref)
    if found.source is None or found.source.text != captured.source.text:  # type: ignore[union-attr]
        raise InvalidArgument(
            f"parts.{name}: the stored memory {ref!r} stands for another text than parts.{name} "
            "has, so its questions would be compared with the wrong one"
        )
    return found


def _spread(found: Composition) -> Mapping[str, float]:
    return {"orders": len(found.orders), "spread": found.spread(_metric(found)).value}


def _metric(found: Composition) -> str:
    return "nll_gold" if "nll_gold" in found.report.metrics else "kl"


def _facts(found: Composition) -> dict[str, Any]:
    metric = _metric(found)
    facts: dict[str, Any] = {
        "orders": len(found.orders),
        f"spread of {metric} over orders": str(found.spread(metric)),
        "answers that the order flips": str(found.flipped()),
    }
    costs = found.cost(metric)
    return facts | {f"{metric}, composed less alone: {n}": value for n, value in costs.items()}
