"""Fields of OpenAI's API that the endpoint does not have, and what they may say all the same.

A field that would change the answer is refused by name, unless it says what happens anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvedit.serving.openai.problems import Problem, Refusal

__all__ = ["without_neutral"]

_IDLE = frozenset((
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "service_tier", "user",
))  # fmt: skip
"""Fields that no answer depends on."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that are not supported, and the values that ask for nothing."""


def without_neutral(data: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """Returns a request without the fields that ask for nothing.

    Args:
        data: the request.
        known: fields that the endpoint has.

    Raises:
        Refusal: for the first field that asks for something that is not supported.
    """
    kept = {name: value for name, value in data.items() if value is not None}
    for name in [name for name in kept if name not in known]:
        if name not in _IDLE and kept[name] not in _NEUTRAL.get(name, ()):
            raise Refusal(Problem(400, _why(name), name, "unsupported_field"))
        del kept[name]
    return kept


def _why(name: str) -> str:
    if name not in _NEUTRAL:
        return f"unknown field {name!r}: leave it out"
    allowed = " or ".join(map(repr, _NEUTRAL[name]))
    return f"{name} is not supported: leave it out" + (f", or send {allowed}" if allowed else "")
