"""``kvedit editors``: the registered editors and their parameters."""

from __future__ import annotations

import dataclasses
import inspect
import re
from argparse import ArgumentParser, Namespace
from typing import Any

from kvedit.runs.verbs.base import Outcome, Verb

__all__ = ["EDITORS"]

_READS = {
    "reader": "  (reads with the model)",
    "by phase": "  (reads with the model in some phases)",
}
_MARKUP = re.compile(r"(?::\w+:)?`+~?([^`]*)`+")  # of docstrings: ``x`` and :class:`x`


def _add(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="one editor, with its whole description")


def _run(args: Namespace) -> Outcome:
    from kvedit.editors import REGISTRY

    if args.name:
        editor = REGISTRY.load(args.name)
        found = {**_described(args.name, editor), "description": inspect.getdoc(editor) or ""}
        return Outcome(found, f"{_signature(found)}\n\n{found['description']}")
    editors = [_described(name, REGISTRY.load(name)) for name in REGISTRY]
    return Outcome(
        editors, "\n".join(f"{_signature(found)}\n    {found['summary']}" for found in editors)
    )


def _described(name: str, editor: Any) -> dict[str, Any]:
    documentation = inspect.getdoc(editor) or ""
    return {
        "editor": name,
        "summary": _MARKUP.sub(r"\1", documentation.split("\n", 1)[0]),
        "reproducibility": _class_of(editor),
        "parameters": [_parameter(field) for field in dataclasses.fields(editor)],
    }


def _class_of(editor: Any) -> str:
    # A property: editors with phases read with the model in some of them only.
    found = editor.reproducibility
    return found if isinstance(found, str) else "by phase"


def _parameter(field: dataclasses.Field[Any]) -> dict[str, Any]:
    found = {"name": field.name, "type": str(field.type), "required": False}
    if field.default is not dataclasses.MISSING:
        value = field.default
        return {**found, "default": value if _is_plain(value) else repr(value)}
    if field.default_factory is not dataclasses.MISSING:
        return {**found, "default": repr(field.default_factory())}
    return {**found, "required": True}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _signature(found: dict[str, Any]) -> str:
    words = []
    for parameter in found["parameters"]:
        name, default = parameter["name"], parameter.get("default")
        if parameter["required"]:
            words.append(f"{name}=…")
        else:
            words.append(f"[{name}]" if default is None else f"[{name}={default}]")
    return " ".join([found["editor"], *words]) + _READS.get(found["reproducibility"], "")


EDITORS = Verb(
    "editors",
    "list the editors and their parameters",
    _add,
    _run,
    "kvedit editors emphasize",
)
