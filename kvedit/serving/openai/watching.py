"""Watch: sits in the model's generation loop, notes every token, and ends it on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kvedit.serving.openai.events import Chosen, Likely, Piece
from kvedit.serving.openai.spelling import Speller

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Watch"]


class Watch:
    """A stopping criterion of ``generate`` that sees each token just after it was chosen.

    Args:
        tokenizer: spells tokens.
        speller: spells the answer; None where nobody asks before its end.
        start: tokens of the prompt, which ``generate`` puts in front.
        top: how many of the likeliest tokens to note, or None for no probabilities.
        say: takes the pieces of a stream, or None.
        cancelled: whether nobody waits any more.

    Attributes:
        chosen: every token's probability.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        speller: Speller | None,
        start: int,
        top: int | None,
        say: Callable[[Piece], None] | None,
        cancelled: Callable[[], bool],
    ) -> None:
        """Nothing was seen yet."""
        self._tokenizer, self._speller, self._start = tokenizer, speller, start
        self._top, self._say, self._cancelled = top, say, cancelled
        self._logits: torch.Tensor | None = None
        self.chosen: list[Chosen] = []

    def hook(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Keeps the logits of a forward pass; of a gated one, those that stand come last."""
        # Not what ``generate`` hands to processors: there, the model's own settings (a penalty of
        # repetition for example) have been at work.
        self._logits = output.logits[0, -1].float()

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Returns ``[batch]`` bool: whether the only row ends here.

        Args:
            ids: ``[batch, token]`` prompt and answer so far.
            scores: not looked at.
            **kwargs: not looked at.
        """
        for token in ids[0, self._start :].tolist():
            self._note(token)
        self._start = ids.shape[1]
        return torch.full((ids.shape[0],), self._cancelled(), device=ids.device)

    def _note(self, token: int) -> None:
        offset = self._speller.length if self._speller is not None else 0
        text = self._speller.feed(token) if self._speller is not None else ""
        chosen = self._likely(token, offset)
        if chosen is not None:
            self.chosen.append(chosen)
        if self._say is not None:
            self._say(Piece(text, chosen))

    def _likely(self, token: int, offset: int) -> Chosen | None:
        if self._top is None or self._logits is None:
            return None
        logprobs = self._logits.log_softmax(dim=-1)
        values, indices = logprobs.topk(min(self._top, len(logprobs)))
        pairs = zip(indices.tolist(), values.tolist(), strict=True)
        top = tuple(self._one(index, value) for index, value in pairs)
        return Chosen(self._one(token, float(logprobs[token])), top, offset)

    def _one(self, token: int, logprob: float) -> Likely:
        text = str(self._tokenizer.decode([token], skip_special_tokens=False))
        return Likely(text, logprob, "\ufffd" not in text)
