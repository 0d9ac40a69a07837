"""Job: one prompt to answer, in the library's own terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvedit.serving.openai.problems import Problem, Refusal
from kvedit.serving.openai.schema import AnyAsked, CompletionAsked

__all__ = ["Job", "jobs_of"]


@dataclass(frozen=True)
class Job:
    """What the model is asked.

    Args:
        prompt: a text, token ids, or chat messages.
        chat: whether it is a chat's next turns; a text goes on as text otherwise.
        tokens: new tokens at most.
        exact: whether a prompt that leaves no room for so many is refused; else it gets what fits.
        sampling: options of ``generate``; none of them is greedy decoding.
        stop: texts that end the answer.
        seed: seed of sampling, or None.
        logprobs: how many of the likeliest tokens to tell at each place, or None for nothing.
        stream: whether to tell tokens as they come.
    """

    prompt: Any
    chat: bool
    tokens: int
    exact: bool
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    stream: bool = False


def jobs_of(asked: AnyAsked, most: int) -> list[Job]:
    """Returns one job per prompt of a request.

    Args:
        asked: the request.
        most: new tokens that a request may ask for.

    Raises:
        Refusal: if it asks for more.
    """
    shared: dict[str, Any] = {
        "sampling": asked.sampling, "stop": asked.stop, "seed": asked.seed, "stream": asked.stream,
    }  # fmt: skip
    if isinstance(asked, CompletionAsked):
        tokens = _within(asked.max_tokens, most, "max_tokens")
        return [
            Job(prompt, False, tokens, True, logprobs=asked.logprobs, **shared)
            for prompt in asked.prompt
        ]
    named = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    wanted = asked.max_completion_tokens or asked.max_tokens
    messages = [{"role": one.role, "content": one.content} for one in asked.messages]
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    tokens = most if wanted is None else _within(wanted, most, named)
    return [Job(messages, True, tokens, wanted is not None, logprobs=top, **shared)]


def _within(wanted: int, most: int, name: str) -> int:
    if wanted > most:
        message = f"{name}: expected at most {most}, the server's limit, found {wanted}"
        raise Refusal(Problem(400, message, name, "too_many_tokens"))
    return wanted
