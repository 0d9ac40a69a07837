"""The one way into attention: a function and a mask registered in transformers' interfaces.

Every layer of every model that follows transformers' attention interface calls
``fn(module, query, key, value, mask, scaling=…)`` after its cache was updated. While a model is
:func:`routed`, that function is ours. It asks the cache that the keys came from (through a mark on
the tensor that the cache returned) what to add, lets observers look and replace, and calls the
backend that the user chose. Without a marked cache and without observers it is the backend.

The registered mask function builds no tensor: it hands on transformers' own mask *rule*, which is
evaluated at RoPE positions instead of slot numbers by a cache that knows them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from kvedit.errors import UnsupportedModel
from kvedit.models.attention_call import BACKENDS, AttentionCall, MaskRule, Observer, Output
from kvedit.models.explicit import run_explicit
from kvedit.models.extension import run_extended

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MARK", "acquire", "observed", "observing", "plain_name", "release", "routed"]

MARK = "_kvedit_cache"
"""Attribute by which a key tensor names the cache that returned it."""

PREFIX = "kvedit_"

_observers: ContextVar[tuple[Observer, ...]] = ContextVar("kvedit_observers", default=())
_lock = threading.Lock()
_routed: WeakKeyDictionary[PreTrainedModel, tuple[int, str]] = WeakKeyDictionary()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Lets ``observer`` see the attention calls of routed models within the block."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def observed() -> bool:
    """Whether someone sees the attention calls that are made now."""
    return bool(_observers.get())


def plain_name(model: PreTrainedModel) -> str:
    """Returns the model's own attention implementation, also while it is routed."""
    name = str(model.config._attn_implementation)
    return BACKENDS[name.removeprefix(PREFIX)] if name.startswith(PREFIX) else name


@contextmanager
def routed(model: PreTrainedModel) -> Iterator[None]:
    """Routes the model's attention through kvedit within the block; nests, in any order.

    Raises:
        UnsupportedModel: if the model does not follow the attention interface, or its attention
            implementation is none of sdpa, eager, flex_attention, flash_attention_2 to 4.
    """
    acquire(model)
    try:
        yield
    finally:
        release(model)


def acquire(model: PreTrainedModel) -> None:
    """Routes the model until a matching :func:`release`; the first of several switches it."""
    with _lock:
        count, original = _routed.get(model, (0, ""))
        if count == 0:
            _register()
            original = str(model.config._attn_implementation)
            model.set_attn_implementation(PREFIX + _short(model, original))
        _routed[model] = (count + 1, original)


def release(model: PreTrainedModel) -> None:
    """Ends one :func:`acquire`; the last one restores the model's own implementation."""
    with _lock:
        count, original = _routed[model]
        if count == 1:
            del _routed[model]
            model.set_attn_implementation(original)
        else:
            _routed[model] = (count - 1, original)


def _short(model: PreTrainedModel, name: str) -> str:
    if not model._can_set_attn_implementation():
        raise UnsupportedModel(
            f"{type(model).__name__} computes attention inside its own modules instead of calling "
            "transformers' attention interface; kvedit can't reach it"
        )
    for short, full in BACKENDS.items():
        if full == name:
            return short
    raise UnsupportedModel(
        f"attention implementation {name!r}: expected one of {', '.join(BACKENDS.values())}; "
        "call model.set_attn_implementation first"
    )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    for short in BACKENDS:
        AttentionInterface.register(PREFIX + short, partial(_attention, short))
        AttentionMaskInterface.register(PREFIX + short, _mask)


def _mask(*, mask_function: Callable[..., torch.Tensor], **arguments: Any) -> MaskRule:
    return MaskRule(mask_function, {**arguments, "mask_function": mask_function})


def _attention(
    backend: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> Output:
    causal = options.pop("is_causal", None)
    causal = bool(getattr(module, "is_causal", True)) if causal is None else causal
    call = AttentionCall(
        module, backend, query, key, value, attention_mask, causal, scaling, options
    )
    cache = getattr(key, MARK, None)
    if cache is not None:
        call = cache.complete(call)
    run: Callable[[AttentionCall], Output] = _run
    for observer in _observers.get():
        run = partial(_around, observer, run)
    return run(call)


def _run(call: AttentionCall) -> Output:
    if call.adjust is not None:
        return run_explicit(call)
    return call.run() if call.bias is None else run_extended(call)


def _around(
    observer: Observer, inner: Callable[[AttentionCall], Output], call: AttentionCall
) -> Output:
    return observer.around(call, inner)
