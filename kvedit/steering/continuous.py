"""steered: a delta that acts on hidden states while the model runs, with the KV cache on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvedit.editors.target import as_number
from kvedit.errors import InvalidArgument, UnknownName, UnsupportedModel
from kvedit.memory import Delta, KVMemory
from kvedit.models.inspection import inspect
from kvedit.runtime.places import block_of
from kvedit.runtime.session import Session
from kvedit.steering.conditions import Judge, Rule
from kvedit.steering.operators import OPERATORS, Change, change_of
from kvedit.steering.scopes import Scope, as_scope
from kvedit.steering.tokens import Tokens
from kvedit.steering.tracking import Tracker, tracking

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["steered"]

_open: ContextVar[tuple[object, ...]] = ContextVar("kvedit_steered", default=())


class _Steering:
    """One block of :func:`steered`: what its hooks share.

    Args:
        tracker: what tells tokens apart.
        scope: which tokens are steered.
        operator: a key of ``OPERATORS``.
        strength: c.
        preserve_norm: whether states keep their length.
        judge: decides rows, or None.
        sessions: sessions that are steered; None for whatever runs.
    """

    def __init__(
        self, tracker: Tracker, scope: Scope, operator: str, strength: float, preserve_norm: bool,
        judge: Judge | None, sessions: Sequence[Session] | None,
    ) -> None:  # fmt: skip
        """Keeps the parts; nothing is computed yet."""
        self.tracker, self.scope, self.judge = tracker, scope, judge
        self.operator, self.strength, self.preserve_norm = operator, strength, preserve_norm
        self._caches = None if sessions is None else [session.cache for session in sessions]
        self._last: tuple[Tokens, torch.Tensor | bool] | None = None

    def running(self) -> Tokens | None:
        """Returns the tokens of the running pass if this block acts on it."""
        if self not in _open.get():
            return None
        if self._caches is not None and not any(self.tracker.cache() is c for c in self._caches):
            return None
        return self.tracker.tokens()

    def mask(self, tokens: Tokens) -> torch.Tensor | bool:
        """Returns bool ``[batch, query]``, or one bool where it is the same for all tokens."""
        if self._last is None or self._last[0] is not tokens:
            found = self.scope.mask(tokens)
            self._refuse_pieces(tokens, found)
            if self.judge is not None:
                found = found & self.judge.met(tokens)
            whole: torch.Tensor | bool = found
            if bool(found.all()):
                whole = True
            elif not bool(found.any()):
                whole = False
            self._last = (tokens, whole)
        return self._last[1]

    def _refuse_pieces(self, tokens: Tokens, found: torch.Tensor) -> None:
        if self.scope.needs_end and tokens.misjudged:
            raise InvalidArgument(
                "this prompt came in several passes, and its end was not known in the first: feed "
                "it in one pass or through generate, or steer Positions(start, stop)"
            )
        given = found & ~tokens.said
        if self.judge is None or not (tokens.continues or not tokens.whole):
            return
        if bool(given.any()):
            raise InvalidArgument(
                "this prompt comes in several passes, and a condition is decided by all of it, so "
                "its first tokens can't be steered: take scope='generation', or one pass"
            )

    def apply(self, change: Change, states: torch.Tensor) -> torch.Tensor:
        """Returns states ``[batch, query, hidden]`` of the running pass, steered."""
        tokens = self.running()
        if tokens is None:
            return states
        mask = self.mask(tokens)
        if isinstance(mask, bool):
            return change(states) if mask else states
        return torch.where(mask.to(states.device)[..., None], change(states), states)


@contextmanager
def steered(
    model: PreTrainedModel,
    delta: Delta | KVMemory,
    strength: float = 1.0,
    *,
    scope: Any = "all",
    operator: Literal["add", "ablate", "ablate_add"] = "add",
    preserve_norm: bool = False,
    condition: Rule | None = None,
    session: Session | Sequence[Session] | None = None,
) -> Iterator[None]:
    """Steers hidden states within the block, in sessions, ``kv.generate``, and plain calls.

    Residual vectors are added to what a layer's block hands on, attention vectors to what its
    attention returns. Which tokens are steered depends on what they are (:mod:`.scopes`), not on
    how they come: padding, batches, pieces, turns and the KV cache make no difference. What
    ``generate`` chose counts as generated, and what :func:`kvedit.score` scores; all else is a
    prompt, unless it is fed within :func:`kvedit.runtime.saying.saying`. Without a cache, what
    was said in earlier turns is a prompt like the rest.

    Blocks nest, and add up. They act in the thread (context) that opened them.

    Args:
        model: the model that made the delta.
        delta: residual and attention vectors, or an operand that holds them.
        strength: c, with sign; see :data:`.operators.OPERATORS`.
        scope: ``"all"``, ``"prompt"``, ``"generation"``, :class:`.scopes.Last`,
            :class:`.scopes.Positions`, a span of tokens, or a union or difference of these.
        operator: ``"add"``, ``"ablate"`` or ``"ablate_add"``.
        preserve_norm: whether each state keeps its length.
        condition: steer only rows whose prompt meets it (:class:`.conditions.Condition`, and by
            ``&`` and ``|`` several).
        session: steer this session's passes only, or those of several; None steers all passes.

    Raises:
        InvalidArgument: for keys and values, a parameter out of range, or a condition that is
            decided after layers that it steers.
        IncompatibleModel: if another model made the delta.
        UnknownName: if there is no such operator.
    """
    found = inspect(model)
    delta = _stream_only(Delta.of(delta))
    delta.require_same_model(found.spec)
    if operator not in OPERATORS:
        raise UnknownName("steering operator", operator, OPERATORS)
    strength = as_number("strength", strength)
    judge = None if condition is None else Judge(condition, found.spec, delta)
    sessions = [session] if isinstance(session, Session) else session
    handles: list[Any] = []
    with tracking(model) as tracker:
        steering = _Steering(
            tracker, as_scope(scope), operator, strength, preserve_norm, judge, sessions
        )
        token = _open.set((*_open.get(), steering))
        try:
            for layer in judge.layers if judge is not None else ():
                block = block_of(model, found.attention[layer])
                handles.append(block.register_forward_hook(_judging(steering, judge, layer)))
            for site, vectors in delta.vectors.items():
                for layer, vector in vectors.items():
                    module = found.attention[layer]
                    module = module if site == "attention" else block_of(model, module)
                    handles.append(module.register_forward_hook(_hook(steering, vector, site)))
            yield
        finally:
            _open.reset(token)
            for handle in handles:
                handle.remove()


def _stream_only(delta: Delta) -> Delta:
    held = [site for site in ("keys", "values") if site in delta.sites]
    if held:
        raise InvalidArgument(
            f"this delta has {' and '.join(held)}, which live in a memory: kv.editors.Steer adds "
            "them there, once. steered() takes residual and attention vectors: "
            'delta.only(sites=("residual", "attention"))'
        )
    return delta


def _hook(steering: _Steering, vector: torch.Tensor, site: str) -> Any:
    made: dict[tuple[torch.dtype, torch.device], Change] = {}

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        if not isinstance(states, torch.Tensor):
            raise UnsupportedModel(f"{type(module).__name__} returns no hidden states to steer")
        kind = (states.dtype, states.device)
        if kind not in made:
            made[kind] = change_of(
                steering.operator, vector, steering.strength, steering.preserve_norm, states
            )
        changed = steering.apply(made[kind], states)
        if changed is states:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _judging(steering: _Steering, judge: Judge | None, layer: int) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        tokens = steering.running()
        if tokens is not None and judge is not None:
            judge.look(tokens, layer, output[0] if isinstance(output, tuple) else output)

    return hook
