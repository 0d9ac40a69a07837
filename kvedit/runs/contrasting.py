"""Contrasting: the ``contrast`` section of a config, pairs of a template or of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.runs.targets import fill
from kvedit.steering.contrast import Contrast
from kvedit.steering.templates import few_shot_reasoning, persona, refusal, style_pairs

__all__ = ["TEMPLATES", "contrast_of"]

_LISTS = (
    "answers",
    "harmless",
    "prompts",
    "questions",
    "refusals",
    "replies",
    "requests",
    "starts",
)


def contrast_of(section: Any) -> Contrast:
    """Returns the pairs of a checked ``contrast`` section: ``template`` and its parameters.

    Raises:
        InvalidArgument: if a value is missing, of another type, or a file can't be read.
        UnknownName: if a template or a key does not exist.
    """
    if not isinstance(section, Mapping) or "template" not in section:
        raise InvalidArgument(
            f"contrast: expected keys and values with a template ({', '.join(TEMPLATES)}), found "
            f"{section!r}"
        )
    values = dict(section)
    name = values.pop("template")
    if name not in TEMPLATES:
        raise UnknownName("template of a contrast", str(name), TEMPLATES)
    for key in _LISTS:
        # A text would be taken letter by letter.
        if not isinstance(values.get(key, []), list | tuple | None):
            raise InvalidArgument(f"contrast.{key}: expected a list, found {values[key]!r}")
    return fill("contrast", TEMPLATES[name], values)


def _file(path: str, prompt: bool | None = None) -> Contrast:
    """Returns the pairs of a JSON or JSONL file; see :meth:`Contrast.read`."""
    found = Contrast.read(path)
    return found if prompt is None else replace(found, prompt=prompt)


def _style_pairs(replies: Sequence[Sequence[str]], name: str = "style") -> Contrast:
    for reply in replies:
        three = isinstance(reply, list | tuple) and len(reply) == 3
        if not three or not all(isinstance(part, str) and part for part in reply):
            raise InvalidArgument(
                f"contrast.replies: expected [request, styled reply, plain reply], found {reply!r}"
            )
    return style_pairs([(str(a), str(b), str(c)) for a, b, c in replies], name)


TEMPLATES: Mapping[str, Callable[..., Contrast]] = {
    "few_shot_reasoning": few_shot_reasoning,
    "file": _file,
    "persona": persona,
    "refusal": refusal,
    "style_pairs": _style_pairs,
}
"""Name of a template to what makes its pairs."""
