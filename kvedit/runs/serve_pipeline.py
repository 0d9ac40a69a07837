"""The pipeline of serving: two versions of a memory behind one endpoint, against kv.generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kvedit.editors import REGISTRY
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.runs import sections, steps
from kvedit.runs.endpoint import Endpoint, serving
from kvedit.runs.serving_report import Exchange, ServingRun
from kvedit.runs.stage import Say, Stage, perform
from kvedit.runs.targets import fill
from kvedit.runtime import attach, score

__all__ = ["Plan", "plan", "run"]

SECTIONS = ("editor", "serving")


@dataclass(frozen=True)
class Plan:
    """A config that was checked.

    Args:
        config: the config.
        context: what is captured.
        editor: the editor.
        questions: what is asked, of both versions.
        patience: seconds until the endpoint must take requests.
        together: requests that are under way at once.
    """

    config: Mapping[str, Any]
    context: Any
    editor: Any
    questions: tuple[str, ...]
    patience: float
    together: int


def plan(config: Mapping[str, Any]) -> Plan:
    """Returns a checked config; see :func:`kvedit.runs.pipelines.plan`."""
    sections.check_known(config, SECTIONS)
    if not config.get("editor"):
        raise InvalidArgument(
            f"nothing to do: choose an editor (editor=..., of {', '.join(REGISTRY)})"
        )
    sections.check_shared(config, SECTIONS)
    if not config["reuse"].get("enabled", True) or config["reuse"].get("verify") == "off":
        raise InvalidArgument(
            "reuse: the second process is the endpoint, which checks all that it reads; expected "
            "enabled=true and verify=full"
        )
    if config["model"].get("revision") is not None:
        raise InvalidArgument("model.revision: kvedit serve takes a folder of that revision")
    context = fill("document", steps.read_document, config["document"])
    editor = sections.build_editor(config["editor"])
    questions = fill("questions", _questions, config["questions"])
    patience, together = fill("serving", _serving, config["serving"])
    return Plan(config, context, editor, questions, patience, together)


def run(config: Mapping[str, Any], folder: Path, say: Say = print) -> ServingRun:
    """Returns how an endpoint answered; see :func:`kvedit.runs.pipelines.run`."""
    checked = plan(config)
    return perform(config, folder, say, lambda stage: _report(checked, stage))


def _questions(edited: Mapping[str, Any], unrelated: Sequence[str] = ()) -> tuple[str, ...]:
    return (fill("questions.edited", steps.Question, edited).text, *unrelated)


def _serving(patience: float = 180.0, together: int = 4) -> tuple[float, int]:
    if patience <= 0 or together < 1:
        raise InvalidArgument(
            f"serving: expected patience above 0 and together from 1, found {patience}, {together}"
        )
    return patience, together


def _report(checked: Plan, stage: Stage) -> ServingRun:
    config, step = checked.config, stage.step
    loaded = step("load", lambda: steps.load_model(**config["model"]))
    plain = step("capture", lambda: steps.capture(loaded, checked.context, **config["capture"]))
    others = steps.operands(loaded, checked.editor, config["store"]["path"], stage.say)
    edited = step("edit", lambda: steps.edit(loaded, plain, checked.editor, others))
    records = step("put", lambda: [sections.put(one, **config["store"]) for one in (plain, edited)])
    # The edited one by its name; the other by its digest, as the name has moved on from it.
    refs = {"before": records[0].record, "after": records[1].name}
    memories = {"before": plain, "after": edited}
    pairs = [(side, text) for text in checked.questions for side in refs]
    own = step("answer", lambda: [_own(loaded, memories[s], t, config["answer"]) for s, t in pairs])
    with serving(_words(config), torch.get_num_threads(), checked.patience) as endpoint:
        asked = [(refs[side], memories[side], text) for side, text in pairs]
        found = step("serve", lambda: _ask(endpoint, checked, asked))
    exchanges = tuple(
        Exchange(side, text, mine, probabilities, **theirs)
        for (side, text), (mine, probabilities), theirs in zip(pairs, own, found, strict=True)
    )
    return ServingRun(
        task=str(config["task"]),
        model=config["model"]["name"],
        dtype=str(plain.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        slots=edited.slots,
        exchanges=exchanges,
        together=checked.together,
        started=endpoint.started,
        pid=endpoint.pid,
        record=records[1].record,
        version=records[1].version,
        store=(config["store"]["path"], config["store"]["name"]),
        seconds=stage.seconds,
    )


def _own(
    loaded: steps.Loaded, memory: KVMemory, question: str, options: Mapping[str, Any]
) -> tuple[str, tuple[float, ...]]:
    """Returns the library's answer, and the log-probabilities of its tokens."""
    with attach(loaded.model, memory, loaded.tokenizer) as session:
        reply: Any = session.generate(question, **options)
    ids = torch.tensor(reply.tokens)
    (scored,) = score(loaded.model, loaded.tokenizer, memory, question, [ids])
    return reply.text, tuple(scored.logprobs.tolist())


def _words(config: Mapping[str, Any]) -> list[str]:
    model = config["model"]
    words = [str(config["store"]["path"]), "--model", str(model["name"])]
    for name in ("dtype", "device", "attn"):
        if model.get(name) is not None:
            words += [f"--{name}", str(model[name])]
    return words


def _ask(
    endpoint: Endpoint, checked: Plan, asked: Sequence[tuple[str, KVMemory, str]]
) -> list[dict[str, Any]]:
    """Returns each answer over HTTP: alone, streamed, and among others at the same time."""
    bodies = [_body(checked, *one) for one in asked]
    alone = [endpoint.post(path, body) for path, body in bodies]
    repeats = int(checked.config["reuse"].get("repeats", 1))
    streamed = [[endpoint.stream(path, body) for _ in range(repeats)] for path, body in bodies]
    with ThreadPoolExecutor(checked.together) as pool:
        crowd = list(pool.map(lambda one: endpoint.post(*one), bodies))
    return [
        {
            "alone": _text(reply),
            "streamed": tuple(each.text for each in streams),
            "crowded": _text(other),
            "logprobs": _logprobs(reply),
            "cached": reply["usage"]["prompt_tokens_details"]["cached_tokens"],
            "first": median(each.first for each in streams),
            "whole": median(each.seconds for each in streams),
        }
        for reply, streams, other in zip(alone, streamed, crowd, strict=True)
    ]


def _body(checked: Plan, ref: str, memory: KVMemory, text: str) -> tuple[str, dict[str, Any]]:
    options = checked.config["answer"]
    tokens = options.get("max_new_tokens", 32)
    body: dict[str, Any] = {"model": ref, "max_tokens": tokens}
    if options.get("stop"):
        body["stop"] = list(options["stop"])
    if memory.source is not None and memory.source.chat is not None:
        messages = [{"role": "user", "content": text}]
        return "chat/completions", body | {"messages": messages, "logprobs": True}
    return "completions", body | {"prompt": text, "logprobs": 0}


def _text(reply: Mapping[str, Any]) -> str:
    choice = reply["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def _logprobs(reply: Mapping[str, Any]) -> tuple[float, ...]:
    found = reply["choices"][0]["logprobs"]
    if "content" in found:
        return tuple(one["logprob"] for one in found["content"])
    return tuple(found["token_logprobs"])
