"""divergence: how differently a model behaves over two memories, on probe prompts.

Kullback and Leibler (1951), *On information and sufficiency*, for the divergence; Efron (1979),
*Bootstrap methods*, for the interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.bootstrap import mean_interval
from kvedit.memory import KVMemory
from kvedit.runtime.attaching import attach
from kvedit.runtime.text import encode_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Divergence", "ProbeResult", "divergence", "token_divergence"]


@dataclass(frozen=True)
class ProbeResult:
    """One prompt, read over both memories.

    Args:
        prompt: the prompt.
        tokens: its tokens, each of which gives one pair of next-token distributions.
        kl: mean KL(a‖b) over these, in nats per token.
        worst: largest KL(a‖b) of one token, in nats.
        agreement: fraction of tokens in [0, 1] with the same most likely next token.
        flipped: whether the greedy answers differ; None if none were asked for.
        answers: the greedy answers over a and b, or None.
    """

    prompt: str
    tokens: int
    kl: float
    worst: float
    agreement: float
    flipped: bool | None = None
    answers: tuple[str, str] | None = None


@dataclass(frozen=True)
class Divergence:
    """How far b's behaviour is from a's; every prompt counts the same.

    Args:
        probes: one result per prompt.
        seed: seed of the bootstrap.
        max_new_tokens: tokens of the greedy answers; 0 if there are none.
    """

    probes: tuple[ProbeResult, ...]
    seed: int
    max_new_tokens: int

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.probes)

    @property
    def kl(self) -> float:
        """Mean of the prompts' KL(a‖b), in nats per token."""
        return fmean(probe.kl for probe in self.probes)

    @property
    def agreement(self) -> float:
        """Mean of the prompts' top-1 agreement, in [0, 1]."""
        return fmean(probe.agreement for probe in self.probes)

    @property
    def flipped(self) -> int | None:
        """Number of greedy answers that differ; None if none were asked for."""
        return sum(bool(p.flipped) for p in self.probes) if self.max_new_tokens else None

    @property
    def kl_interval(self) -> tuple[float, float] | None:
        """95 % percentile-bootstrap interval of :attr:`kl` over prompts; None for one prompt."""
        return mean_interval([probe.kl for probe in self.probes], self.seed)

    @property
    def agreement_interval(self) -> tuple[float, float] | None:
        """95 % percentile-bootstrap interval of :attr:`agreement`; None for one prompt."""
        return mean_interval([probe.agreement for probe in self.probes], self.seed)

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data, with the summary."""
        summary = ("n", "kl", "kl_interval", "agreement", "agreement_interval", "flipped")
        found: dict[str, Any] = {name: getattr(self, name) for name in summary}
        return {**found, **asdict(self)}

    def __repr__(self) -> str:
        """A table with one line per prompt, and the summary below it."""
        rows = [("prompt", "tokens", "KL nats/token", "worst", "top-1", "answer")]
        for probe in self.probes:
            answer = {None: "", True: "flipped", False: "same"}[probe.flipped]
            numbers = f"{probe.kl:.4g}", f"{probe.worst:.4g}", f"{probe.agreement:.1%}"
            rows.append((_short(probe.prompt), str(probe.tokens), *numbers, answer))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        low, high = self.kl_interval or (None, None)
        spread = "" if low is None else f" (95 % {low:.4g} to {high:.4g}, seed {self.seed})"
        parts = [f"n={self.n}", f"KL {self.kl:.4g}{spread}", f"top-1 {self.agreement:.1%}"]
        if self.flipped is not None:
            parts.append(f"{self.flipped} of {self.n} answers flipped")
        return ", ".join(parts)


def divergence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    a: KVMemory,
    b: KVMemory,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 0,
    chat: bool | None = None,
    batch_size: int = 4,
    seed: int = 0,
    strict: bool = True,
) -> Divergence:
    """Returns how far a model's behaviour over ``b`` is from that over ``a``.

    Each prompt is read once over each memory, the same tokens in the same batch; equal memories
    give exactly 0. KL(a‖b) is not symmetric: it weighs what ``a`` finds likely.

    Args:
        model: the model that made both memories.
        tokenizer: its tokenizer.
        a: the reference, for example a memory before an edit.
        b: the other one.
        prompts: probe prompts, as :func:`kvedit.generate` takes them.
        max_new_tokens: tokens of a greedy answer per prompt and memory; 0 asks for none.
        chat: True or False overrides how the contexts were captured.
        batch_size: prompts per forward pass. It holds logits ``[prompt, token, vocabulary]`` of
            both memories. Prompts of one batch are padded; 1 pads nothing.
        seed: seed of the bootstrap.
        strict: whether the compatibility gate holds.

    Raises:
        InvalidArgument: if there is no prompt, or one is cut into other tokens behind ``b`` than
            behind ``a``.
        IncompatibleModel: if a memory does not fit the model.
    """
    if isinstance(prompts, str) or not prompts:
        raise InvalidArgument(f"expected a list of prompts, found {prompts!r}")
    if batch_size < 1 or max_new_tokens < 0:
        raise InvalidArgument(
            f"expected batch_size >= 1 and max_new_tokens >= 0, found {batch_size}, "
            f"{max_new_tokens}"
        )
    probes: list[ProbeResult] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        ids = [_ids(tokenizer, (a, b), prompt, chat) for prompt in batch]
        logits = [_read(model, memory, ids, strict) for memory in (a, b)]
        results = [
            _probe(prompt, *pair)
            for prompt, pair in zip(batch, zip(*logits, strict=True), strict=True)
        ]
        if max_new_tokens:
            results = _answered(model, tokenizer, (a, b), results, ids, max_new_tokens, strict)
        probes += results
    return Divergence(tuple(probes), seed, max_new_tokens)


def token_divergence(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns KL(a‖b) in nats and whether the most likely token is the same, per token.

    Args:
        a: ``[token, vocabulary]`` logits of the reference.
        b: ``[token, vocabulary]`` logits of the other.

    Returns:
        ``[token]`` float64 divergences, of float32 log-probabilities and so with an error of
        about 1e-7, also below zero; and ``[token]`` bool.
    """
    p, q = a.float().log_softmax(dim=-1), b.float().log_softmax(dim=-1)
    # A token that a rules out adds nothing; 0 * inf would be NaN.
    terms = torch.where(p == -torch.inf, 0.0, p.double().exp() * (p - q).double())
    return terms.sum(dim=-1).cpu(), (a.argmax(dim=-1) == b.argmax(dim=-1)).cpu()


def _ids(
    tokenizer: PreTrainedTokenizerBase | None,
    memories: tuple[KVMemory, KVMemory],
    prompt: str,
    chat: bool | None,
) -> torch.Tensor:
    first, second = (
        encode_turn(tokenizer, memory.source, prompt, chat).tokens[memory.tokens_count :]
        for memory in memories
    )
    if not torch.equal(first, second):
        raise InvalidArgument(
            f"the prompt {_short(prompt)!r} is cut into other tokens behind b than behind a: "
            f"{second.tolist()[:8]} and {first.tolist()[:8]}; compare memories whose contexts end "
            "alike, or pass chat=False"
        )
    return first


def _read(
    model: PreTrainedModel, memory: KVMemory, prompts: list[torch.Tensor], strict: bool
) -> Iterator[torch.Tensor]:
    """Returns the logits ``[token, vocabulary]`` of every prompt behind a memory."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    valid = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        # Padding stands on the right, where no token sees it.
        ids[row, : len(prompt)] = prompt
        valid[row, : len(prompt)] = True
    with attach(model, memory, rows=len(prompts), strict=strict) as session:
        logits = session.forward(ids, valid)
    return (logits[row, : len(prompt)] for row, prompt in enumerate(prompts))


def _probe(prompt: str, a: torch.Tensor, b: torch.Tensor) -> ProbeResult:
    kl, same = token_divergence(a, b)
    return ProbeResult(
        prompt, len(kl), float(kl.mean()), float(kl.max()), float(same.double().mean())
    )


def _answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    memories: tuple[KVMemory, KVMemory],
    probes: list[ProbeResult],
    prompts: list[torch.Tensor],
    tokens: int,
    strict: bool,
) -> list[ProbeResult]:
    sides = []
    for memory in memories:
        with attach(model, memory, tokenizer, rows=len(prompts), strict=strict) as session:
            replies: Any = session.generate(prompts, max_new_tokens=tokens, do_sample=False)
        sides.append(replies if isinstance(replies, list) else [replies])
    return [
        replace(probe, flipped=a.tokens != b.tokens, answers=(a.text, b.text))
        for probe, a, b in zip(probes, *sides, strict=True)
    ]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else f"{line[:37]}..."
