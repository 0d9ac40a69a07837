"""``key=value`` words of the command line as an editor's parameters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from kvedit.errors import InvalidArgument

__all__ = ["build_editor", "parse_value", "read_settings"]

_TEXTS = {"SpanLike", "str", "None"}


def parse_value(text: str) -> Any:
    """Returns JSON as what it says, a YAML list or mapping likewise, anything else as text.

    Bare words and sentences stay text: a span like ``note: keep`` is no mapping, ``yes`` no
    boolean. Quotes make text of what would be a number: ``'"60"'``.

    Raises:
        InvalidArgument: if a list or mapping is not closed, or not well-formed.

    Example:
        >>> parse_value("[0, -1]"), parse_value("2.3"), parse_value("note: keep")
        ([0, -1], 2.3, 'note: keep')
        >>> parse_value("{text: sixty days, occurrence: 2}")
        {'text': 'sixty days', 'occurrence': 2}
    """
    try:
        return json.loads(text)
    except ValueError:
        pass
    if not text.lstrip().startswith(("[", "{")):
        return text
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # of OmegaConf, and of the YAML library beneath it
        raise InvalidArgument(f"can't read {text!r} as a YAML list or mapping: {error}") from error


def build_editor(words: Iterable[str]) -> Any:
    """Returns the editor of ``NAME key=value …``.

    Parameters that are texts or spans stay text where the value looks like a number.

    Raises:
        InvalidArgument: if a word is no ``key=value``, or a parameter is wrong.
        UnknownName: if no editor has that name.
    """
    from kvedit.editors import REGISTRY, build

    name, *pairs = words
    fields = dataclasses.fields(REGISTRY.load(name))
    texts = {f.name for f in fields if set(str(f.type).split(" | ")) <= _TEXTS}
    parameters: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InvalidArgument(f"editor {name}: expected key=value, found {pair!r}")
        if key in parameters:
            raise InvalidArgument(f"editor {name}: {key} is given twice")
        value = parse_value(text)
        plain = not isinstance(value, str | dict | list)
        parameters[key] = text if key in texts and plain else value
    return build(name, **parameters)


def read_settings(words: Iterable[str]) -> dict[str, Any]:
    """Returns ``key=value`` words as nested plain data; a dot in a key goes one level down.

    Raises:
        InvalidArgument: if a word is no ``key=value``, or a key is given twice.

    Example:
        >>> read_settings(["steps=40", "freeze.keys=true"])
        {'steps': 40, 'freeze': {'keys': True}}
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        *path, last = name.split(".")
        if not equals or not all((*path, last)):
            raise InvalidArgument(f"--set: expected key=value or group.key=value, found {word!r}")
        section = found
        for key in path:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise InvalidArgument(f"--set: {name} is below {key}, which is given as a value")
        if last in section:
            raise InvalidArgument(f"--set: {name} is given twice")
        section[last] = parse_value(text)
    return found
