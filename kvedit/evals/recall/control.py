"""losslessness: the control of every measurement. An unchanged memory must change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.divergence import token_divergence
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.recall.reading import Ids, Listener
from kvedit.evals.recall.spelling import spell
from kvedit.memory import KVMemory
from kvedit.models.inspection import inspect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Losslessness", "losslessness"]


@dataclass(frozen=True)
class Losslessness:
    """How far a path's memory is from the context itself, over all tokens of all prompts.

    Args:
        difference: largest absolute difference of a log-probability, in nats, between the memory
            that came through the path and one forward pass over context and prompt.
        kl: largest KL(context‖memory) of one token, in nats.
        agreement: share of tokens with the same most likely next token.
        direct: ``difference`` of the memory that did not take the path: what is due to capture.
        digest_kept: whether the path gave back the same content, bit by bit.
        prompts: number of prompts.
        tokens: number of tokens compared.
        tolerance: what ``difference`` may be.
    """

    difference: float
    kl: float
    agreement: float
    direct: float
    digest_kept: bool
    prompts: int
    tokens: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance

    def __bool__(self) -> bool:
        """Same as ``passed``."""
        return self.passed

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {**asdict(self), "passed": self.passed}


def losslessness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    full: KVMemory,
    path: Callable[[KVMemory], KVMemory],
    prompts: Sequence[str],
    *,
    tolerance: float = 1e-4,
    strict: bool = True,
) -> Losslessness:
    """Returns whether the whole context's KV, sent down a path, still answers as the context does.

    Run it before believing what a trained memory scores through the same path: a loss in storing,
    exporting or serving would be taken for a loss of the method. The other side is the plain
    model on the context's tokens and the prompt's in one pass, without any memory.

    Args:
        model: the model that made the memory.
        tokenizer: its tokenizer.
        full: an unedited capture of a context; its tokens are read again, so it must have them.
        path: what the memory goes through: a store, an export and import, a conversion.
        prompts: what is asked behind it.
        tolerance: on log-probabilities, nats; 1e-4 for float32 (products are summed in another
            order when tokens come in pieces), 0.25 for bfloat16.
        strict: whether the compatibility gate holds.

    Raises:
        InvalidArgument: if there is no prompt, or the memory does not hold its context as it was.
        IncompatibleModel: if what the path returns does not fit the model.
    """
    if isinstance(prompts, str) or not prompts:
        raise InvalidArgument(f"expected a list of prompts, found {prompts!r}")
    context = _context(full)
    listener = Listener(model, inspect(model, tokenizer), tokenizer, 1, strict)
    returned = path(full)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    direct = 0.0
    for text in prompts:
        ids = spell(tokenizer, full, RecallQuestion(text)).prompt
        expected = _in_context(model, context, ids)
        pairs.append((expected, _over(listener, returned, ids)))
        direct = max(direct, _apart(expected, _over(listener, full, ids)))
    compared = [token_divergence(a, b) for a, b in pairs]
    kl, same = (torch.cat(parts) for parts in zip(*compared, strict=True))
    return Losslessness(
        difference=max(_apart(a, b) for a, b in pairs),
        kl=float(kl.max()),
        agreement=float(same.double().mean()),
        direct=direct,
        digest_kept=returned.digest == full.digest,
        prompts=len(pairs),
        tokens=len(kl),
        tolerance=tolerance,
    )


def _context(full: KVMemory) -> Ids:
    """Returns the tokens of a memory that is nothing but its tokens."""
    if full.tokens is None:
        raise InvalidArgument("this memory has no source tokens: pass a capture of the context")
    tokens = tuple(full.tokens.tolist())
    edited = full.rules or any(layer.bias is not None for layer in full.layers.values())
    if edited or full.next_position != len(tokens):
        raise InvalidArgument(
            f"expected an unedited capture at position 0, found {len(tokens)} tokens, next "
            f"position {full.next_position}, bias or rules: {bool(edited)}"
        )
    return tokens


def _in_context(model: PreTrainedModel, context: Ids, prompt: Ids) -> torch.Tensor:
    """Returns ``[token, vocabulary]`` log-probabilities behind each prompt token, by one pass."""
    ids = torch.tensor([[*context, *prompt]], device=model.device)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -len(prompt) :]
    return logits.float().log_softmax(dim=-1).cpu()


def _over(listener: Listener, memory: KVMemory, prompt: Ids) -> torch.Tensor:
    # The prompt's own tokens are predicted behind its first one.
    answer = (*prompt[1:], 0)
    (found,) = listener.read(memory, [prompt[:1]], [[answer]])
    return found[answer].cpu()


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
