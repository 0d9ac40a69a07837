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

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from einops import rearrange

from kvedit.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MARK", "AttentionCall", "MaskRule", "Observer", "observing", "plain_name", "routed"]

MARK = "_kvedit_cache"
"""Attribute by which a key tensor names the cache that returned it."""

PREFIX = "kvedit_"

# Our names for the backends. Flash gets a name without "flash", since transformers derives masks
# and padding from that word, and the marked path hands its kernel no mask at all.
BACKENDS = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flex": "flex_attention",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "fa4": "flash_attention_4",
}

Output = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class MaskRule:
    """What transformers would have turned into a mask tensor.

    Args:
        rule: ``rule(batch, head, query_index, key_index) -> bool tensor``, broadcasting.
        arguments: all arguments of the mask call, to build the tensor if it is needed.
    """

    rule: Callable[..., torch.Tensor]
    arguments: dict[str, Any]

    def allows(self, queries: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Returns which slots a query may see by position.

        Args:
            queries: ``[batch, query]`` RoPE positions.
            slots: ``[batch, slot]`` RoPE positions.

        Returns:
            Bool ``[batch, 1, query, slot]``.

        Raises:
            UnsupportedModel: if the model adds a rule that is not a function of positions.
        """
        if self.arguments.get("use_vmap"):
            raise UnsupportedModel(
                "this model's attention mask is no function of positions (it was given an overlay "
                "rule, as image or prefix tokens need); kvedit can't place memories under it"
            )
        batch = torch.arange(queries.shape[0], device=queries.device)[:, None, None, None]
        head = torch.zeros(1, dtype=torch.int64, device=queries.device)[None, :, None, None]
        seen = self.rule(batch, head, queries[:, None, :, None], slots[:, None, None, :])
        return seen.expand(queries.shape[0], 1, queries.shape[1], slots.shape[1])

    def build(self, backend: str) -> Any:
        """Returns the mask that the backend would have been given by transformers."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        return ALL_MASK_ATTENTION_FUNCTIONS[BACKENDS[backend]](**self.arguments)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One layer's attention, about to be computed.

    Args:
        module: the attention module.
        backend: key of ``BACKENDS``.
        query: ``[batch, query_head, query, dim]``, post-RoPE.
        key: ``[batch, head, slot, dim]``, post-RoPE, memory and new tokens.
        value: ``[batch, head, slot, dim]``.
        mask: None, a :class:`MaskRule`, or a tensor (bool, or additive float) that broadcasts to
            ``[batch, query_head, query, slot]``.
        causal: whether a mask of None means a causal square; otherwise it means all of it.
        scaling: factor on query-key products.
        options: whatever else the model passed.
        bias: float ``[batch or 1, query_head, 1, slot]`` not yet in ``mask``, for backends that
            take it by other means; else None.
    """

    module: torch.nn.Module
    backend: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    causal: bool
    scaling: float | None
    options: dict[str, Any] = field(default_factory=dict)
    bias: torch.Tensor | None = None

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @property
    def scale(self) -> float:
        """The scaling in force: the given one, or ``dim ** -0.5``."""
        return self.query.shape[-1] ** -0.5 if self.scaling is None else float(self.scaling)

    def run(self) -> Output:
        """Computes attention by the chosen backend."""
        mask = self.mask.build(self.backend) if isinstance(self.mask, MaskRule) else self.mask
        options = dict(self.options)
        if self.backend == "sdpa":
            options["is_causal"] = self.causal
        return _backend(self.backend, self.module)(
            self.module, self.query, self.key, self.value, mask, scaling=self.scaling, **options
        )


class Observer(Protocol):
    """Something that looks at attention calls, and may replace them."""

    def around(self, call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
        """Returns the output of ``call``; must call ``run`` exactly once unless it replaces it."""
        ...


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
    if call.bias is not None:
        from kvedit.models.extension import run_extended

        return run_extended(call)
    return call.run()


def _around(
    observer: Observer, inner: Callable[[AttentionCall], Output], call: AttentionCall
) -> Output:
    return observer.around(call, inner)


def _backend(backend: str, module: torch.nn.Module) -> Callable[..., Output]:
    if backend == "eager":
        # Every modeling file that follows the interface has its own eager function: it knows the
        # family's softcap and sinks.
        found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if found is None:
            raise UnsupportedModel(
                f"{type(module).__name__} has no eager_attention_forward beside it; "
                "choose another attention implementation"
            )
        return found  # type: ignore[no-any-return]
    if backend.startswith("fa"):
        return partial(_flash, BACKENDS[backend])
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[BACKENDS[backend]]  # type: ignore[no-any-return]


def _flash(
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> Output:
    # transformers' own wrapper reads the implementation's name from the config, where ours stands
    # while the model is routed; so its inner function is called with the real name.
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    known = ("dropout", "sliding_window", "softcap", "s_aux")
    given = {key: options[key] for key in known if options.get(key) is not None}
    output = _flash_attention_forward(
        *(rearrange(x, "batch head slot dim -> batch slot head dim") for x in (query, key, value)),
        mask,
        query_length=query.shape[2],
        is_causal=bool(getattr(module, "is_causal", True)),
        softmax_scale=options.get("scaling"),
        attn_implementation=name,
        **given,
    )
    return output, None


def without_bias(call: AttentionCall, **changes: Any) -> AttentionCall:
    """Returns the call with its separate bias dropped and other fields changed."""
    return replace(call, bias=None, **changes)
