"""What a config may do: fill in the parameters of known functions, and nothing else.

No value of a config is ever imported or instantiated, so ``_target_`` is refused anywhere. That
holds for what kvedit reads; a recipe can still configure Hydra itself (launchers, callbacks), so
run recipes of people whom you trust.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kvedit.errors import InvalidArgument, UnknownName

__all__ = ["check_keys", "fill", "refuse_targets"]

_INSTANTIATE = {"_target_", "_partial_", "_convert_", "_recursive_"}

_PLAIN: Mapping[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a text"),
    "None": ((type(None),), "null"),
}
"""Annotation to the types that it takes, and what a person calls them."""

Result = TypeVar("Result")


def refuse_targets(config: Any, place: str = "") -> None:
    """Raises InvalidArgument if any key, however deep, would have Hydra instantiate something."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            where = f"{place}.{key}" if place else str(key)
            if key in _INSTANTIATE:
                raise InvalidArgument(
                    f"{where}={value!r}: a kvedit config instantiates nothing; remove the key, and "
                    "name an editor with editor=..."
                )
            refuse_targets(value, where)
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            refuse_targets(value, f"{place}[{index}]")


def check_keys(section: str, function: Callable[..., Any], values: Any, given: int = 0) -> None:
    """Raises unless ``values`` are keyword arguments of ``function``.

    Args:
        section: name of the config's section, for messages.
        function: what will be called; a class stands for its constructor.
        values: the section.
        given: positional parameters that do not come from the config.

    Raises:
        InvalidArgument: if the section is no mapping, lacks a parameter without default, or a
            value is of another type than the parameter.
        UnknownName: if a key is no parameter.
    """
    if not isinstance(values, Mapping):
        raise InvalidArgument(f"{section}: expected keys and values, found {values!r}")
    parameters = dict(list(inspect.signature(function).parameters.items())[given:])
    for key in values:
        if key not in parameters:
            raise UnknownName(f"key of {section}", str(key), parameters)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in values:
            raise InvalidArgument(f"{section}.{name} is missing")
    for key, value in values.items():
        _check_type(f"{section}.{key}", str(parameters[key].annotation), value)


def _check_type(place: str, annotation: str, value: Any) -> None:
    """Raises InvalidArgument if a value is none of the plain types that are annotated."""
    names = annotation.split(" | ")
    if not set(names) <= set(_PLAIN):
        return  # what else it may be is for the function to say
    kinds = tuple(kind for name in names for kind in _PLAIN[name][0])
    # True is an int to Python, and no number to who writes a config.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(_PLAIN[name][1] for name in names)
        raise InvalidArgument(f"{place}: expected {wanted}, found {value!r}")


def fill(section: str, function: Callable[..., Result], values: Any, *args: Any) -> Result:
    """Calls ``function`` with a section of a config, after :func:`check_keys`."""
    check_keys(section, function, values, given=len(args))
    return function(*args, **values)
