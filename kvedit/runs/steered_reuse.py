"""The second process of steering: it answers from what is stored, and from nothing else.

``python -m kvedit.runs.steered_reuse``. A steered prompt is a memory, gone on behind without any
hook; a delta is taken from the store and steers while the model runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.recall.reading import Ids
from kvedit.evals.steering import Asker, Steering
from kvedit.evals.steering.asker import Place
from kvedit.evals.steering.entering import Entry
from kvedit.memory import Delta, KVMemory
from kvedit.memory.digest import digest_tensor
from kvedit.runs.elsewhere import ask_elsewhere, serve
from kvedit.runs.steps import Answer
from kvedit.runs.targets import fill
from kvedit.runtime.attaching import open_session
from kvedit.runtime.saying import saying
from kvedit.runtime.text import extend_source
from kvedit.steering.conditions import Condition
from kvedit.steering.prompting import offset_ids

__all__ = ["Request", "behind", "reply_at", "reuse", "second_process"]


@dataclass(frozen=True)
class Request:
    """What is asked of the second process.

    Args:
        store: folder of the store.
        model: parameters of :func:`kvedit.runs.steps.load_model`.
        ask: parameters of :class:`~kvedit.evals.steering.Asker`.
        prompts: what is asked while steering is on.
        memories: prompt to the record of its steered memory.
        steering: a config's ``steering`` section, with its strength.
        delta: record of the delta that steers.
        condition: ``ref``, and parameters of :class:`~kvedit.steering.conditions.Condition`.
        verify: how the store checks.
        threads: torch threads; None leaves torch's own choice.
    """

    store: str
    model: Mapping[str, Any]
    ask: Mapping[str, Any]
    prompts: Sequence[str] = ()
    memories: Mapping[str, str] = field(default_factory=dict)
    steering: Mapping[str, Any] | None = None
    delta: str | None = None
    condition: Mapping[str, Any] | None = None
    verify: Literal["full", "off"] = "full"
    threads: int | None = None

    def __post_init__(self) -> None:
        """Checks that there is something to answer, and what it takes."""
        if not self.prompts and not self.memories:
            raise InvalidArgument("expected prompts or memories, found none")
        if self.prompts and (self.steering is None or self.delta is None):
            raise InvalidArgument("prompts need the delta that steers, and how")


def reuse(request: Request) -> dict[str, Any]:
    """Returns answers, the digests of their logits, and timings, as plain data."""
    from kvedit.runs.steps import load_model
    from kvedit.runs.ways import read_way
    from kvedit.store import Store

    if request.threads is not None:
        torch.set_num_threads(request.threads)
    with Store(request.store) as store:

        def get(ref: str) -> KVMemory:
            return store.get(ref, verify=request.verify)

        # What can't be had is refused before a model is loaded.
        memories = {prompt: get(ref) for prompt, ref in request.memories.items()}
        delta = None if request.delta is None else Delta.of(get(request.delta))
        condition = None
        if request.condition is not None:
            values = dict(request.condition)
            condition = Condition(Delta.of(get(values.pop("ref"))), **values)
    loaded = load_model(**request.model)
    asker = Asker(loaded.model, loaded.tokenizer, batch_size=1, **request.ask)
    started = time.perf_counter()
    answers = {text: reply_at(asker, behind(asker, m)) for text, m in memories.items()}
    if delta is not None and request.steering is not None:
        way = read_way(request.steering)
        part, options = way.part(delta), {} if condition is None else {"condition": condition}

        def make() -> Steering:
            made: Steering = way.steering(loaded.model, part, way.strength, **options)
            return made

        for prompt, place in zip(request.prompts, asker.places(request.prompts), strict=True):
            answers[prompt] = reply_at(asker, place, Entry(make))
    return {
        "pid": os.getpid(),
        "content": {text: memory.digest for text, memory in memories.items()},
        "verified": all(memory.verified for memory in memories.values()),
        "answers": {text: asdict(given) for text, given in answers.items()},
        "seconds": {"load": loaded.seconds, "answers": time.perf_counter() - started},
    }


def behind(asker: Asker, memory: KVMemory) -> Place:
    """Returns where the answer to a prompt begins that is in memory to its last token."""
    ids = offset_ids(asker.tokenizer, asker.offset)
    if memory.source is None:
        raise InvalidArgument("the memory has no source tokens: it is no prompt")
    source = extend_source(memory.source, torch.tensor(ids), asker.tokenizer)
    return Place(memory, tuple(ids), source)


def reply_at(asker: Asker, place: Place, entry: Entry | None = None) -> Answer:
    """Returns the greedy answer at a place, and the digest of all logits it was chosen from."""
    with (entry or Entry()).on() as change:
        (reply,) = asker.reply([place], change)
        logits = _logits(asker, change(place.memory), place.ids, reply.tokens)
    return Answer(reply.text.strip(), reply.tokens, digest_tensor(logits))


def _logits(asker: Asker, memory: KVMemory | None, prompt: Ids, answer: Ids) -> torch.Tensor:
    """Returns the logits ``[token, vocabulary]`` of each of the answer's tokens."""
    with open_session(
        asker.model, asker.inspection, [memory], asker.tokenizer, asker.strict
    ) as session:
        logits = [session.forward(torch.tensor([prompt]), keep=1)[0]]
        if len(answer) > 1:
            with saying():
                logits.append(session.forward(torch.tensor([answer[:-1]]))[0])
    return torch.cat(logits)


def second_process(config: Mapping[str, Any], asker: Asker, **asked: Any) -> dict[str, Any] | None:
    """Returns what a new process makes of what was stored, or None if it is not enabled.

    Args:
        config: the run's config; its store, model and reuse are used.
        asker: how it is asked.
        **asked: the rest of a :class:`Request`.
    """
    section = {"enabled": True, "verify": "full"} | config["reuse"]
    if not section["enabled"]:
        return None
    ask = {name: getattr(asker, name) for name in ("hold", "offset", "chat", "max_new_tokens")}
    request = Request(
        store=config["store"]["path"], model=config["model"], ask=ask, verify=section["verify"],
        threads=torch.get_num_threads(), **asked,
    )  # fmt: skip
    return ask_elsewhere("kvedit.runs.steered_reuse", asdict(request))


if __name__ == "__main__":
    sys.exit(serve(lambda data: reuse(fill("request", Request, data))))
