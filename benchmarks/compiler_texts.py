"""Certifies the bias compiler on kinds of text that no fit has seen, kind by kind.

    python benchmarks/compiler_texts.py --squad FILE --gsm8k FILE --facts FILE

The library's own held-out text is short, and heads differ between kinds of text. Here the model's
queries are read from encyclopedia articles, word problems, chats about both, facts, and this
repository's documents and code, and all heads are compiled at one strength.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compiler_fidelity import CONTEXT, SPAN
from einops import rearrange

import kvedit as kv
from kvedit.editors.compiling import Certificate, Compile, certify
from kvedit.memory import KVMemory
from kvedit.memory.operand import make_operand, operand_facts

ROOT = Path(__file__).resolve().parents[1]
STRENGTH = 4.6
LENGTH = 700  # tokens of a text
DOCS = ("docs/store.md", "docs/runtime.md", "CONTRIBUTING.md")
CODE = ("kvedit/runtime/cache.py", "kvedit/store/pack.py", "tests/memory/test_span.py")


def main() -> None:
    """Prints one row for all texts, and one per kind."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--squad", type=Path, required=True, help="in SQuAD's shape")
    parser.add_argument("--gsm8k", type=Path, required=True, help="JSON lines: question, answer")
    parser.add_argument("--facts", type=Path, required=True, help="in the shape of known_1000")
    options = parser.parse_args()
    model, tokenizer = kv.load("smollm2-135m")
    memory = kv.capture(model, tokenizer, CONTEXT)
    biased = kv.editors.Emphasize(span=SPAN, strength=STRENGTH)(memory)
    kinds = texts(options, tokenizer)
    every = [text for part in kinds.values() for text in part]
    started = time.perf_counter()
    queries = kv.calibrate(model, tokenizer, held_out=every, samples=16 * len(every) * 2)
    print(f"{len(every)} texts held out, calibrated in {time.perf_counter() - started:.0f} s")
    print("| texts | n | mean in 0.97–1.03: query, KV heads | spread ≤ 0.10 | means | KV failed |")
    print("|---|---:|---|---|---|---:|")
    for fit in ("ridge", "distance", "balanced"):
        print(
            row(f"all, {fit}", len(every), certify(biased, queries, Compile(fit=fit))), flush=True
        )
    for kind, part in kinds.items():
        own = kv.calibrate(model, tokenizer, held_out=part, samples=2 * 30 * len(part))
        print(row(kind, len(part), certify(biased, own, Compile())), flush=True)


def held_only(queries: KVMemory, start: int, stop: int, texts: int) -> KVMemory:
    """Returns the operand with only the held-out samples of texts number ``start`` to ``stop``."""
    facts = operand_facts(queries, "queries")
    fit, each = int(facts["fit"]), int(facts["held_out"]) // texts
    kept = [*range(fit), *range(fit + start * each, fit + stop * each)]
    vectors = {}
    for index, layer in queries.layers.items():
        pattern = "kv_head (group sample) dim -> kv_head group sample dim"
        group = queries.model.layers[index].group
        chosen = rearrange(layer.keys, pattern, group=group)[:, :, kept]
        vectors[index] = rearrange(chosen, "kv_head group sample dim -> kv_head (group sample) dim")
    rest = {key: facts[key] for key in ("fit", "texts")}
    rest |= {"held_out": len(kept) - fit, "positions": [facts["positions"][i] for i in kept]}
    return make_operand("queries", vectors, queries.model, queries.lineage, **rest)


def texts(options: argparse.Namespace, tokenizer: Any) -> dict[str, Sequence[Any]]:
    """Returns texts and chats by kind."""
    articles = json.loads(options.squad.read_text(encoding="utf-8"))["data"]
    lines = options.gsm8k.read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines]
    facts = json.loads(options.facts.read_text(encoding="utf-8"))
    plain = {
        "encyclopedia": [
            "\n\n".join(p["context"] for p in article["paragraphs"]) for article in articles[1:20:4]
        ],
        "word problems": [worked(problems[k * 20 :][:6]) for k in range(4)],
        "facts": [stated(facts[k * 50 :][:50]) for k in range(2)],
        "documents": [(ROOT / name).read_text(encoding="utf-8") for name in DOCS],
        "code": [(ROOT / name).read_text(encoding="utf-8") for name in CODE],
    }
    chats = {
        "chat about passages": [passage_chat(article) for article in articles[2:22:5]],
        "chat about problems": [problem_chat(problems[k * 20 + 10 :][:4]) for k in range(3)],
    }
    return {kind: [cut(tokenizer, t) for t in part] for kind, part in plain.items()} | chats


def cut(tokenizer: Any, text: str) -> str:
    """Returns the first LENGTH tokens of a text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:LENGTH]
    return str(tokenizer.decode(ids))


def worked(problems: Sequence[dict[str, str]]) -> str:
    """Returns problems with their answers."""
    return "\n\n".join(f"Question: {p['question']}\nAnswer: {p['answer']}" for p in problems)


def stated(facts: Sequence[dict[str, str]]) -> str:
    """Returns facts as sentences."""
    return " ".join(f"{fact['prompt']} {fact['attribute']}." for fact in facts)


def passage_chat(article: dict[str, Any]) -> list[dict[str, str]]:
    """Returns a chat about a passage, which stands in the system message."""
    passage = article["paragraphs"][0]
    turns = [{"role": "system", "content": f"Answer from the passage. {passage['context']}"}]
    for qa in passage["qas"][:6]:
        turns.append({"role": "user", "content": qa["question"]})
        turns.append({"role": "assistant", "content": qa["answers"][0]["text"]})
    return turns


def problem_chat(problems: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Returns a chat in which problems are solved."""
    turns = []
    for problem in problems:
        turns.append({"role": "user", "content": problem["question"]})
        turns.append({"role": "assistant", "content": problem["answer"]})
    return turns


def row(name: str, count: int, certificate: Certificate) -> str:
    """Returns one line of the table."""
    mean, spread = certificate.share()
    kv_mean, kv_spread = certificate.share(by="kv")
    means = [head.total.mean for head in certificate.heads]
    return (
        f"| {name} | {count} | {mean:.1%}, {kv_mean:.1%} | {spread:.1%}, {kv_spread:.1%} | "
        f"{min(means):.3f}–{max(means):.3f} | {len(certificate.failed)} |"
    )


if __name__ == "__main__":
    main()
