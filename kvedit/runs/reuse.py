"""The second process: opens the store, checks a memory, answers from it.

``python -m kvedit.runs.reuse`` reads one JSON request on stdin and writes one JSON reply on stdout.
It shares nothing with the process that stored the memory but the store's folder.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.runs.elsewhere import ask_elsewhere, serve
from kvedit.runs.targets import fill

__all__ = ["Request", "main", "reuse", "reuse_elsewhere", "second_process"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Request:
    """What is asked of the second process.

    Args:
        store: folder of the store.
        ref: the memory, best by its record digest.
        model: parameters of :func:`kvedit.runs.steps.load_model`.
        questions: what to answer; timings are of the first one.
        answer: further parameters of :func:`kvedit.runs.steps.answer`.
        verify: how the store checks.
        repeats: how often each timing is taken.
        threads: torch threads; None leaves torch's own choice.
    """

    store: str
    ref: str
    model: Mapping[str, Any]
    questions: Sequence[str]
    answer: Mapping[str, Any] = field(default_factory=dict)
    verify: Literal["full", "off"] = "full"
    repeats: int = 3
    threads: int | None = None

    def __post_init__(self) -> None:
        """Checks what would otherwise be found out late."""
        if self.repeats < 1 or not self.questions:
            raise InvalidArgument(
                f"expected at least one repeat and one question, found {self.repeats}, "
                f"{len(self.questions)}"
            )


def reuse(request: Request) -> dict[str, Any]:
    """Returns answers, the logits' digests and timings, as plain data."""
    import torch

    from kvedit.runs.steps import answer, first_logits, load_model, prefill
    from kvedit.store import Store

    if request.threads is not None:
        torch.set_num_threads(request.threads)
    question = request.questions[0]
    with Store(request.store) as store:

        def fetch() -> KVMemory:
            return store.get(request.ref, verify=request.verify)

        memory = fetch()  # what can't be had is refused before a model is loaded
        loaded = load_model(**request.model)
        # The first pass of a process is slower than later ones; it is reported by itself.
        cold, _ = _timed(lambda: first_logits(loaded, fetch(), question))
        get, token, full = [], [], []
        for _ in range(request.repeats):
            seconds, memory = _timed(fetch)
            get.append(seconds)
            token.append(_timed(first_logits, loaded, memory, question)[0])
            full.append(_timed(prefill, loaded, memory, question)[0])
    answers = {text: answer(loaded, memory, text, **request.answer) for text in request.questions}
    return {
        "pid": os.getpid(),
        "content": memory.digest,
        "verified": memory.verified,
        "answers": {text: asdict(given) for text, given in answers.items()},
        "seconds": {
            "load": loaded.seconds,
            "cold": cold,
            "get": statistics.median(get),
            "first_token": statistics.median(token),
            "prefill": statistics.median(full),
        },
    }


def reuse_elsewhere(request: Request) -> dict[str, Any]:
    """Returns what a new process made of a request; see :func:`reuse`.

    Raises:
        KVEditError: if it refused, with its message, or died.
    """
    return ask_elsewhere("kvedit.runs.reuse", asdict(request))


def second_process(
    config: Mapping[str, Any],
    ref: str,
    questions: Sequence[str],
    enabled: bool = True,
    verify: Literal["full", "off"] = "full",
    repeats: int = 3,
) -> dict[str, Any] | None:
    """Returns what a new process makes of a stored memory, or None if it is not enabled.

    Args:
        config: the run's config; its store, model and answer are used.
        ref: the memory, best by its record digest.
        questions: what to answer.
        enabled: whether there is a second process.
        verify: how the store checks.
        repeats: how often each timing is taken.
    """
    if not enabled:
        return None
    import torch

    return reuse_elsewhere(
        Request(
            store=config["store"]["path"],
            ref=ref,
            model=config["model"],
            questions=questions,
            answer=config["answer"],
            verify=verify,
            repeats=repeats,
            threads=torch.get_num_threads(),
        )
    )


def main() -> int:
    """Answers the request on stdin; 1 if it was refused, with the reason as ``error``."""
    return serve(lambda data: reuse(fill("request", Request, data)))


def _timed(run: Callable[..., Result], *args: Any) -> tuple[float, Result]:
    started = time.perf_counter()
    result = run(*args)
    return time.perf_counter() - started, result


if __name__ == "__main__":
    sys.exit(main())
