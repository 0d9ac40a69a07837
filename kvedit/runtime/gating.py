"""The plausibility gate: steering that the unsteered model finds implausible is taken back.

Directer (arXiv 2603.06745), for any steering: static bias and rules alike. One forward pass of a
gated session, be it a prompt or one token, becomes several:

1. unsteered: no bias (evicted slots included) and no rules, in any layer;
2. steered in all layers that steer, then in the more important half of them, a quarter, and so on
   to one, until the most likely token at the row's last position has, unsteered, at least ``beta``
   times the probability of the most likely one;
3. if none will do, the unsteered pass stands.

Logits, keys and values are those of the pass that was accepted. Rows of a batch are judged, and
kept, each by itself. (The published code keeps the unsteered keys and values of accepted tokens,
judges one row, takes ``>`` for ``>=``, and falls back before it tries a single layer.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.models.route import observed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvedit.runtime.cache import MemoryCache

__all__ = ["pass_gate"]


def pass_gate(model: PreTrainedModel, cache: MemoryCache, given: dict[str, Any], raw: Any) -> Any:
    """Returns the output of a forward pass after the gate; the cache holds what goes with it.

    Args:
        model: the live model.
        cache: the session's cache, just after the unsteered pass.
        given: what the model was called with.
        raw: output of the unsteered pass.

    Raises:
        InvalidArgument: if the output has no logits by name. On this and any other error the
            cache is as it was before the call.
    """
    tokens = int(given["position_ids"].shape[1])
    before = cache.fed - tokens
    try:
        cache.steered.trying = True
        return _Search(model, cache, given, raw, tokens).run()
    except BaseException:
        cache.recover()
        cache.crop(before - cache.fed)
        raise
    finally:
        cache.steered.trying, cache.steered.active = False, None


class _Search:
    """One gated forward pass."""

    def __init__(
        self, model: PreTrainedModel, cache: MemoryCache, given: dict[str, Any], raw: Any, new: int
    ) -> None:
        """Keeps the unsteered pass."""
        if getattr(raw, "logits", None) is None:
            raise InvalidArgument(
                "a gated memory needs the model's logits: call it with return_dict=True, and a "
                "model with a language-model head"
            )
        self.model, self.cache, self.new = model, cache, new
        self.gates = cache.steered.gates
        self.valid = cache.valid[:, -new:].clone()
        # The mask was taken off the call when the cache was told of it.
        self.given = {**given, "attention_mask": self.valid.long()}
        self.kept = raw
        self.states = [[x.clone() for x in layer.recent(new)] for layer in cache.layers]
        self.raw = self._last(raw)

    def run(self) -> Any:
        """Tries until every row is settled; returns the stitched output."""
        rows = range(self.cache.rows)
        settled: dict[int, int | None] = {}
        trial = 0
        while len(settled) < len(rows):
            trials = [settled.get(row, trial) for row in rows]
            output = self._steered(trials)
            accepted = [row for row, fine in enumerate(self._judge(output)) if fine]
            fresh = [row for row in accepted if row not in settled]
            if len(fresh) == len(rows):
                return output
            self._keep(output, fresh)
            settled.update(dict.fromkeys(fresh, trial))
            trial += 1
            for row, gate in enumerate(self.gates):
                if row not in settled and (gate is None or trial >= gate.trials):
                    settled[row] = None
        trials = [settled[row] for row in rows]
        if None in trials and observed():
            self._steered(trials)  # observers last see what stands
        self._restore()
        return self.kept

    def _steered(self, trials: Sequence[int | None]) -> Any:
        self.cache.crop(-self.new)
        self.cache.steered.trial(trials)
        return self.model(**self.given)

    def _judge(self, output: Any) -> list[bool]:
        """Returns which rows have nothing against their most likely token."""
        choice = self._last(output).argmax(dim=-1)
        chosen = self.raw.gather(1, choice[:, None]).squeeze(1)
        # Of one softmax: the ratio of probabilities is the difference of logits.
        margins = (chosen - self.raw.amax(dim=-1)).tolist()
        fed = self.valid.any(dim=1).tolist()
        return [
            gate is None or not real or margin >= math.log(gate.beta)
            for gate, real, margin in zip(self.gates, fed, margins, strict=True)
        ]

    def _last(self, output: Any) -> torch.Tensor:
        """Returns the logits at each row's last real position, float32 ``[batch, vocabulary]``."""
        logits: torch.Tensor = output.logits.detach()
        places = torch.arange(1, self.new + 1, device=self.valid.device)
        last = (self.valid * places).amax(dim=1) - 1
        column = (last - (self.new - logits.shape[1])).clamp_min(0).to(logits.device)
        rows = torch.arange(logits.shape[0], device=logits.device)
        return logits[rows, column].float()

    def _keep(self, output: Any, rows: Sequence[int]) -> None:
        if not rows:
            return
        self.kept = _stitched(self.kept, output, torch.tensor(rows), self.cache.rows)
        for layer, states in zip(self.cache.layers, self.states, strict=True):
            for old, fresh in zip(states, layer.recent(self.new), strict=True):
                old[rows] = fresh[rows]

    def _restore(self) -> None:
        for layer, states in zip(self.cache.layers, self.states, strict=True):
            for place, kept in zip(layer.recent(self.new), states, strict=True):
                place.copy_(kept)


def _stitched(old: Any, fresh: Any, rows: torch.Tensor, total: int) -> Any:
    """Returns ``old`` with some rows of every tensor taken from ``fresh``."""
    if isinstance(old, torch.Tensor) and old.ndim and old.shape[0] == total:
        at = rows.to(old.device)
        return old.index_copy(0, at, fresh[at])
    if isinstance(old, dict):
        parts = {key: _stitched(old[key], fresh[key], rows, total) for key in old}
        return type(old)(**parts)
    if isinstance(old, tuple | list):
        pairs = zip(old, fresh, strict=True)
        return type(old)(_stitched(a, b, rows, total) for a, b in pairs)
    return old
