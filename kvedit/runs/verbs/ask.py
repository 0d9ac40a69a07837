"""``kvedit ask`` and ``kvedit score``: what a model says, or would say, over a stored memory."""

from __future__ import annotations

import argparse
import math
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from kvedit.runs.verbs.base import Outcome, Verb, table
from kvedit.runs.verbs.options import (
    REF,
    add_model,
    add_prompt,
    add_store,
    load_model_of,
    note,
    open_store,
    positive,
)

__all__ = ["ASK", "SCORE"]


def _add_ask(parser: ArgumentParser) -> None:
    parser.add_argument("ref", help=REF)
    parser.add_argument("question", nargs="+", help="each is asked on its own")
    add_store(parser)
    add_model(parser, default="the one that made the memory")
    add_prompt(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="0, the default: greedy"
    )
    parser.add_argument("--seed", type=int, help="of sampling")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends a reply; repeatable")
    parser.add_argument("--stream", action="store_true", help="print the reply as it comes")


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and 0 or above, found {text}")
    return value


def _ask(args: Namespace) -> Outcome:
    store = open_store(args)
    record = store.show(args.ref).record
    memory = store.get(record.record)
    model, tokenizer = load_model_of(memory, args)
    from kvedit.runtime import attach

    options: dict[str, Any] = {"temperature": args.temperature} if args.temperature else {}
    replies = []
    for question in args.question:
        with attach(model, memory, tokenizer, strict=args.strict) as session:
            reply: Any = session.generate(
                question,
                max_new_tokens=args.max_new_tokens,
                chat=args.chat,
                stop=args.stop,
                seed=args.seed,
                stream=_stream(args) if args.stream else None,
                **options,
            )
        if args.stream:
            _stream(args)("\n")
        if not reply.text:
            note(f"the model ended at once after {question!r}: as a text, nothing has to follow it")
        replies.append({"question": question, "text": reply.text, "tokens": len(reply.tokens)})
    data = {"name": record.name, "record": record.record, "model": memory.model.name}
    return Outcome({**data, "replies": replies}, "" if args.stream else _shown(replies))


def _stream(args: Namespace) -> Any:
    # With --json, stdout is for the one document at the end.
    place = sys.stderr if args.json else sys.stdout
    return lambda piece: print(piece, end="", flush=True, file=place)


def _shown(replies: list[dict[str, Any]]) -> str:
    if len(replies) == 1:
        return str(replies[0]["text"])
    return "\n\n".join(f"> {reply['question']}\n{reply['text']}" for reply in replies)


def _add_score(parser: ArgumentParser) -> None:
    parser.add_argument("ref", help=REF)
    parser.add_argument("prompt", help="what stands before the continuations")
    parser.add_argument("continuation", nargs="+", help="quote leading spaces")
    add_store(parser)
    add_model(parser, default="the one that made the memory")
    add_prompt(parser)


def _score(args: Namespace) -> Outcome:
    store = open_store(args)
    record = store.show(args.ref).record
    memory = store.get(record.record)
    model, tokenizer = load_model_of(memory, args)
    from kvedit.runtime import score

    scores = score(
        model,
        tokenizer,
        memory,
        args.prompt,
        args.continuation,
        chat=args.chat,
        strict=args.strict,
    )
    rows = [
        {
            "continuation": one.text,
            "logprob": one.logprob,
            "tokens": len(one.tokens),
            "logprobs": one.logprobs.tolist(),
        }
        for one in scores
    ]
    shown = [
        (
            f"{row['logprob']:.4f}",
            f"{row['logprob'] / row['tokens']:.4f}",
            row["tokens"],
            repr(text),
        )
        for row, text in zip(rows, args.continuation, strict=True)
    ]
    data = {"name": record.name, "record": record.record, "prompt": args.prompt, "scores": rows}
    return Outcome(data, table(("nats", "nats/token", "tokens", "continuation"), shown))


ASK = Verb(
    "ask",
    "continue a stored memory by a question",
    _add_ask,
    _ask,
    "kvedit ask handbook 'How long do I have?' --max-new-tokens 40 --stream",
)
SCORE = Verb(
    "score",
    "how likely continuations are after a stored memory and a prompt",
    _add_score,
    _score,
    "kvedit score handbook 'Refunds are possible for' ' 60 days' ' 30 days'",
)
