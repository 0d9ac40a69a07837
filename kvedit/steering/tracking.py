"""Tracking: finds out, pass by pass, what the tokens are that a model reads.

A forward pass does not tell whether a token was given or said, nor where its prompt ends. A call of
``generate`` does; so while a block is open, ``generate`` of that model notes what it was given.
What a pass is asked with lives in context variables or beside its cache: other threads and other
sessions of the model are not touched. What is global while a block is open: the hooks, which
return at once for others, and the attribute ``model.generate``, which passes calls through.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from kvedit.errors import InvalidArgument
from kvedit.models.cache_argument import CACHE_ARGUMENTS
from kvedit.runtime.cache import MemoryCache
from kvedit.steering.passes import Call, Pass, Trail, begin_call, read_pass
from kvedit.steering.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Tracker", "tracking"]


_active: ContextVar[int] = ContextVar("kvedit_tracking", default=0)
_call: ContextVar[Call | None] = ContextVar("kvedit_generate", default=None)
_pass: ContextVar[Pass | None] = ContextVar("kvedit_pass", default=None)
_lock = threading.Lock()
_trackers: WeakKeyDictionary[PreTrainedModel, Tracker] = WeakKeyDictionary()


class Tracker:
    """Hooks of one model, shared by all blocks that are open on it.

    Args:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Installs the hooks."""
        self.blocks = 0
        self._names = list(inspect.signature(model.forward).parameters)
        self._trails: WeakKeyDictionary[Any, Trail] = WeakKeyDictionary()
        self._handles = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        )
        self._own = model.__dict__.get("generate")
        model.generate = self._noting(model.generate)

    def remove(self, model: PreTrainedModel) -> None:
        """Takes the hooks off, and gives ``generate`` back."""
        for handle in self._handles:
            handle.remove()
        if self._own is None:
            del model.generate
        else:
            model.generate = self._own

    def tokens(self) -> Tokens | None:
        """Returns what the tokens of the running pass are; None outside of one.

        It is first asked within the model, when a session's cache knows of the pass.
        """
        running = _pass.get()
        if running is None:
            return None
        if running.tokens is None:
            running.tokens = read_pass(running, _call.get())
        return running.tokens

    def cache(self) -> Any:
        """Returns the cache that the running pass was given, or None."""
        running = _pass.get()
        return None if running is None else running.cache

    def _noting(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def noting(*args: Any, **kwargs: Any) -> Any:
            if not _active.get():
                return generate(*args, **kwargs)
            call = begin_call(args, kwargs)
            token = _call.set(call)
            try:
                output = generate(*args, **kwargs)
            finally:
                _call.reset(token)
            if call.trail is not None:
                ids = output if isinstance(output, torch.Tensor) else output.sequences
                call.trail.said = ids[:, call.columns :].tolist()
                call.trail.end, call.trail.next, call.trail.given_until = call.end, -1, -1
            return output

        return noting

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not _active.get():
            return
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        read = given.get("input_ids")
        read = given.get("inputs_embeds") if read is None else read
        if read is None:
            raise InvalidArgument("expected input_ids or inputs_embeds")
        cache = next((given[n] for n in CACHE_ARGUMENTS if given.get(n) is not None), None)
        known = cache is None or isinstance(cache, MemoryCache)
        held = 0 if cache is None or known else int(cache.get_seq_length())
        trail = Trail() if cache is None else self._trails.setdefault(cache, Trail())
        _pass.set(Pass(given, cache, read.shape[1], held, trail))

    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        running, tokens = _pass.get(), self.tokens() if _active.get() else None
        if running is None or tokens is None:
            return
        _pass.set(None)
        # By key: as an attribute, transformers 5.24 warns of the name that it gave up.
        fields = output if isinstance(output, Mapping) else {}
        made = next((fields[name] for name in CACHE_ARGUMENTS if name in fields), None)
        if made is None:
            return
        # A pass without a cache may have made one; those that follow are given it.
        self._trails[made] = running.trail
        call = _call.get()
        given = call is None and bool((tokens.valid & ~tokens.said).any())
        running.trail.given_until = running.start + running.query if given else -1
        if call is not None:
            call.trail = running.trail


@contextmanager
def tracking(model: PreTrainedModel) -> Iterator[Tracker]:
    """Tracks what passes of a model read, in this context, within the block; nests."""
    with _lock:
        tracker = _trackers.get(model)
        if tracker is None:
            tracker = _trackers[model] = Tracker(model)
        tracker.blocks += 1
    token = _active.set(_active.get() + 1)
    try:
        yield tracker
    finally:
        _active.reset(token)
        with _lock:
            tracker.blocks -= 1
            if tracker.blocks == 0:
                del _trackers[model]
                tracker.remove(model)
