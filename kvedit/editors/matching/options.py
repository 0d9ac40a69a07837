"""Checks the options of attention matching."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvedit.editors.compacting.budget import as_budget
from kvedit.editors.matching.budgets import COMPETING
from kvedit.editors.matching.keys import METHODS, SCORES
from kvedit.editors.matching.queries import READ, UNREAD
from kvedit.errors import InvalidArgument

if TYPE_CHECKING:
    from kvedit.editors.matching.editor import AttentionMatching

__all__ = ["check_numbers", "frozen_options"]


def frozen_options(editor: AttentionMatching) -> dict[str, Any]:
    """Returns the options that a config file gives as lists or mappings, as tuples.

    Raises:
        InvalidArgument: if one has another form.
    """
    return {
        "bias_range": _range(editor.bias_range),
        "queries": _queries(editor.queries),
        "allocate": _allocation(editor.allocate),
        "ridge": _ridge(editor.ridge),
        "layers": _layers(editor.layers),
        "refine": None if editor.refine is None else _finite("refine", editor.refine),
    }


def check_numbers(editor: AttentionMatching) -> None:
    """Checks names, ranges, and what goes together.

    Raises:
        InvalidArgument: with what was expected and found.
    """
    as_budget(editor.budget)
    for name, known in (("keys", METHODS), ("score", SCORES), ("solver", ("nnls", "clamp"))):
        if getattr(editor, name) not in known:
            raise InvalidArgument(
                f"{name} must be one of {', '.join(known)}, found {getattr(editor, name)!r}"
            )
    for name in ("bias", "values", "on_policy", "fold_bias"):
        if not isinstance(getattr(editor, name), bool):
            raise InvalidArgument(f"{name} must be true or false, found {getattr(editor, name)!r}")
    for name, least in (
        ("steps", 0), ("answer_tokens", 0), ("layers_per_pass", 0), ("sinks", 0), ("recent", 0),
        ("seed", 0), ("max_queries", 8), ("chunk", 1), ("pooling", 1),
    ):  # fmt: skip
        _whole(name, getattr(editor, name), least, name in ("max_queries", "chunk", "pooling"))
    if editor.pooling is not None and editor.pooling % 2 == 0:
        raise InvalidArgument(f"pooling must be odd, found {editor.pooling}")
    _check_together(editor)


def _check_together(editor: AttentionMatching) -> None:
    if editor.fold_bias and editor.allocate != "uniform":
        raise InvalidArgument(
            "fold_bias needs as many slots in every KV head of a layer: allocate must be 'uniform'"
        )
    if editor.fold_bias and not editor.values:
        raise InvalidArgument("fold_bias fits values for no bias: values must be true")
    if editor.on_policy and editor.queries in UNREAD:
        raise InvalidArgument(
            f"queries={editor.queries!r} are not read over the memory, so on_policy has no "
            "meaning for them"
        )
    if editor.layers_per_pass and not editor.on_policy:
        raise InvalidArgument("layers_per_pass is for on_policy=True")
    if isinstance(editor.budget, int) and editor.budget < editor.sinks + editor.recent:
        raise InvalidArgument(
            f"a budget of {editor.budget} slots is less than sinks + recent = "
            f"{editor.sinks + editor.recent}"
        )


def _whole(name: str, value: Any, least: int, optional: bool) -> None:
    if optional and value is None:
        return
    if type(value) is not int or value < least:
        raise InvalidArgument(f"{name} must be a whole number from {least}, found {value!r}")


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidArgument(f"{name} must be a finite number, found {value!r}")
    return float(value)


def _range(value: Any) -> tuple[float, float]:
    pair = tuple(_finite("bias_range", one) for one in value)
    if len(pair) != 2 or not pair[0] <= 0 <= pair[1] or pair[0] == pair[1]:
        raise InvalidArgument(
            f"bias_range must be a low bound up to 0 and a high one from 0, found {list(value)}"
        )
    return pair[0], pair[1]


def _queries(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        if value not in (*READ, *UNREAD):
            known = ", ".join((*READ, *UNREAD))
            raise InvalidArgument(
                f"queries must be one of {known}, or a list of prompts; found {value!r}"
            )
        return value
    prompts = tuple(value or ())
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise InvalidArgument(f"queries: expected one prompt or more, found {value!r}")
    return prompts


def _allocation(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ("uniform", *COMPETING):
            raise InvalidArgument(
                f"allocate must be 'uniform', 'mass', 'peak' or weights by layer, found {value!r}"
            )
        return value
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        rows = tuple(sorted((int(i), tuple(float(w) for w in row)) for i, row in pairs))
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"allocate: expected {{layer: [weight of each KV head]}}, found {value!r}"
        ) from error
    if not rows or not all(w > 0 and math.isfinite(w) for _, row in rows for w in row):
        raise InvalidArgument(f"allocate: weights must be finite and above 0, found {value!r}")
    return rows


def _ridge(value: Any) -> Any:
    if value == "auto":
        return value
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not math.isfinite(value) or value < 0:
        raise InvalidArgument(f"ridge must be a finite number from 0, or 'auto', found {value!r}")
    return float(value)


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    given = tuple(value)
    if not given or not all(type(index) is int for index in given):
        raise InvalidArgument(f"layers must be whole numbers, or null for all, found {value!r}")
    return given
