"""The name under which a model takes its cache: it changed with transformers 5.24."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CACHE_ARGUMENTS", "cache_argument", "is_given"]

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""The newer name first; transformers 5.24 to 5.39 take both and warn of the older one."""


def cache_argument(model: PreTrainedModel) -> str:
    """Returns the name of the argument of ``model.forward``, and of ``generate``, for a cache."""
    parameters = signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), CACHE_ARGUMENTS[-1])


def is_given(cache: object, arguments: Mapping[str, Any]) -> bool:
    """Whether a call's named arguments hand over this very cache, under either name."""
    return any(arguments.get(name) is cache for name in CACHE_ARGUMENTS)
