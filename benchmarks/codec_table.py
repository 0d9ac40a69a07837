"""Measures what the store's codecs save and what they cost; prints the tables of docs/codecs.md.

Each context is captured, continued by the tokens that really follow it, and compared, token by
token, with what the memory gives that no codec has touched:

    python benchmarks/codec_table.py
    python benchmarks/codec_table.py --texts xquad_en_even.json --contexts 16
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvedit as kv
from kvedit.memory import KVMemory
from kvedit.store.codecs import LOSSLESS, LOSSY, approximate, decode, encode

ROOT = Path(__file__).resolve().parents[1]
SHORTEST, LONGEST = 512, 1024
SLOT_AXIS = {"keys": 1, "values": 1, "bias": 1}
RESAMPLES = 10_000


@dataclass(frozen=True)
class Row:
    """One codec on one context.

    Args:
        ratio: bytes of all tensors over bytes at rest.
        divergence: mean KL to the untouched memory, nats per token.
        agreement: share of tokens with the same most likely successor.
        keys: relative error of keys in the worst layer.
        values: likewise for values.
        encode: MB/s, of the tensors.
        decode: MB/s, of the tensors.
    """

    ratio: float
    divergence: float
    agreement: float
    keys: float = 0.0
    values: float = 0.0
    encode: float = float("nan")
    decode: float = float("nan")


def main() -> None:
    """Runs the measurement and prints one table per dtype."""
    options = parse()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    for dtype in (torch.bfloat16, torch.float32):
        model, tokenizer = kv.load(options.model, dtype=dtype)
        rows: dict[str, list[Row]] = defaultdict(list)
        lengths = []
        for ids in windows(tokenizer, list(read_texts(options.texts)), options):
            lengths.append(len(ids) - options.continuation)
            for name, row in measure(model, tokenizer, ids, options.continuation):
                rows[name].append(row)
        name = str(dtype).removeprefix("torch.")
        write(
            f"\n{options.model}, {name}, n = {len(lengths)} contexts of {min(lengths)} to "
            f"{max(lengths)} tokens, {options.continuation} tokens each, seed {options.seed}\n\n"
        )
        write(table(rows, options.seed))
    write(f"\n{time.perf_counter() - started:.0f} s, torch {torch.__version__}\n")


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--texts", type=Path, help="folder of .md and .txt, or SQuAD-shaped JSON")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--contexts", type=int, default=12)
    parser.add_argument("--continuation", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def read_texts(path: Path | None) -> Iterator[str]:
    """Yields texts of a folder, a SQuAD-shaped JSON file (an article is a text), or our docs."""
    if path is not None and path.suffix == ".json":
        for article in json.loads(path.read_text("utf-8"))["data"]:
            yield "\n\n".join(paragraph["context"] for paragraph in article["paragraphs"])
        return
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    files = sorted((*path.glob("*.md"), *path.glob("*.txt"))) if path is not None else pages
    for file in files:
        if file != ROOT / "docs" / "codecs.md":  # it holds the result
            yield file.read_text("utf-8")


def windows(tokenizer: Any, texts: Sequence[str], options: argparse.Namespace) -> list[list[int]]:
    """Returns token windows that share nothing, each a context and its continuation."""
    draw = random.Random(options.seed)
    found = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        while len(ids) >= SHORTEST + options.continuation:
            most = min(LONGEST, len(ids) - options.continuation)
            size = draw.randint(SHORTEST, most) + options.continuation
            found.append(ids[:size])
            ids = ids[size:]
    draw.shuffle(found)
    return found[: options.contexts]


def measure(model: Any, tokenizer: Any, ids: list[int], count: int) -> Iterator[tuple[str, Row]]:
    """Yields a row per codec for one context; ``count`` tokens at the end are its continuation."""
    memory = kv.capture(model, tokenizer, ids[:-count])
    expected = predictions(model, tokenizer, memory, ids[-count:])
    # Yardsticks: the same numbers added up in another order, and what half precision alone does.
    halves = predictions(model, tokenizer, memory, ids[-count:], pieces=2)
    yield "(no codec, read in two pieces)", compared(expected, halves, 1.0)
    if memory.dtype == torch.float32:
        cast = memory.to(dtype=torch.bfloat16).to(dtype=torch.float32)
        found = predictions(model, tokenizer, cast, ids[-count:])
        yield "(no codec, cast to bfloat16)", compared(expected, found, 2.0)
    for codec in (*LOSSLESS, *LOSSY):
        ratio, encoding, decoding = at_rest(memory, codec)
        kept, error = approximate(memory, codec)
        if codec in LOSSLESS:  # at_rest has compared every bit
            yield codec, Row(ratio, 0.0, 1.0, encode=encoding, decode=decoding)
            continue
        row = compared(expected, predictions(model, tokenizer, kept, ids[-count:]), ratio)
        yield (
            codec,
            Row(
                ratio,
                row.divergence,
                row.agreement,
                error.relative["keys"],
                error.relative["values"],
                encoding,
                decoding,
            ),
        )


def predictions(
    model: Any, tokenizer: Any, memory: KVMemory, ids: list[int], pieces: int = 1
) -> torch.Tensor:
    """Returns log-probabilities ``[token, vocabulary]`` after each of ``ids``."""
    with kv.attach(model, memory, tokenizer) as session:
        logits = [session.forward(part)[0] for part in torch.tensor([ids]).chunk(pieces, dim=1)]
    result: torch.Tensor = torch.cat(logits).float().log_softmax(dim=-1)
    return result


def compared(expected: torch.Tensor, found: torch.Tensor, ratio: float) -> Row:
    """Returns how far predictions ``[token, vocabulary]`` are from the expected ones."""
    divergence = (expected.exp() * (expected - found)).sum(dim=-1, dtype=torch.float64)
    agreement = (expected.argmax(dim=-1) == found.argmax(dim=-1)).double()
    return Row(ratio, float(divergence.mean()), float(agreement.mean()))


def at_rest(memory: KVMemory, codec: str) -> tuple[float, float, float]:
    """Returns ratio of bytes, and MB/s of encode and of decode, over all blocks.

    Raises:
        RuntimeError: if a lossless codec loses a bit.
    """
    cut = memory.cut()
    size = sum(block.tensor.nbytes for block in cut)
    start = time.perf_counter()
    made = [encode(b.tensor, b.kind, codec, SLOT_AXIS.get(b.kind, 0)) for b in cut]
    between = time.perf_counter()
    found = [
        decode(m.encoding, m.data, b.tensor.dtype, tuple(b.tensor.shape), b.kind)
        for m, b in zip(made, cut, strict=True)
    ]
    stop = time.perf_counter()
    if codec in LOSSLESS:
        for block, tensor in zip(cut, found, strict=True):
            if not torch.equal(block.tensor.view(torch.uint8), tensor.view(torch.uint8)):
                raise RuntimeError(f"{codec} lost bits in layer {block.layer} {block.kind}")
    stored = sum(len(m.data) for m in made)
    return size / stored, size / (between - start) / 1e6, size / (stop - between) / 1e6


def table(rows: dict[str, list[Row]], seed: int) -> str:
    """Returns a Markdown table, means over contexts with 95 % bootstrap intervals."""
    lines = [
        "| codec | smaller by | KL, nats/token (95 % CI) | worst context | same top token | "
        "error of keys, values | encode, decode MB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        lossless = name in LOSSLESS
        divergence = [row.divergence for row in found]
        low, high = interval(divergence, seed)
        kl = "0" if lossless else f"{np.mean(divergence):.2g} ({low:.2g} to {high:.2g})"
        worst = "0" if lossless else f"{max(divergence):.2g}"
        low, high = interval([row.agreement for row in found], seed)
        mean = average(found, lambda row: row.agreement)
        same = "100 %" if lossless else f"{mean:.1%} ({low:.1%} to {high:.1%})"
        errors = (average(found, lambda row: row.keys), average(found, lambda row: row.values))
        speeds = (average(found, lambda row: row.encode), average(found, lambda row: row.decode))
        lines.append(
            f"| {name} | {average(found, lambda row: row.ratio):.2f} | {kl} | {worst} | {same} | "
            + ("0, 0" if lossless else "–" if not errors[0] else "{:.2%}, {:.2%}".format(*errors))
            + (" | – |" if math.isnan(speeds[0]) else " | {:.0f}, {:.0f} |".format(*speeds))
        )
    return "\n".join(lines) + "\n"


def average(rows: list[Row], get: Callable[[Row], float]) -> float:
    """Returns the mean of one column."""
    return float(np.mean([get(row) for row in rows]))


def interval(values: list[float], seed: int) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of a mean over contexts."""
    draw = np.random.default_rng(seed)
    chosen = draw.integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(np.asarray(values)[chosen].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def write(text: str) -> None:
    """Writes to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
