"""Measures what the bias compiler keeps of an exact bias; prints the tables of docs/reweighting.md.

First the certificate: every fit, strength and storage, on queries that no fit has seen. Then what
a session's attention does afterwards: texts are read over the memory with exact bias and with
compiled keys, and the achieved bias, the attention mass and the next-token distributions are
compared, head by head and at several distances:

    python benchmarks/compiler_fidelity.py
    python benchmarks/compiler_fidelity.py --store memories --json fidelity.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import kvedit as kv
from kvedit.editors.compiling import Certificate, Compile, certify
from kvedit.editors.compiling.compile import FITS
from kvedit.editors.compiling.measuring import attention_logits
from kvedit.errors import NotFound
from kvedit.memory import KVMemory
from kvedit.runtime.generic_text import generic_texts
from kvedit.store.codecs import approximate

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = (
    "The handbook of the library. Books are lent for four weeks. The refund window is 60 days. "
    "Late books cost ten cents a day. The reading room is open from nine to five, and on Saturdays "
    "until noon. Children under twelve need a card that a parent has signed. Lost cards are "
    "replaced for three euros. The library was founded in 1902 by a society of dockers, and moved "
    "to the old customs house after the war. Its largest collection is of maps. Groups are asked "
    "to write a week ahead. The lift is out of order until the end of May; the porter will help "
    "with prams."
)
SPAN = "The refund window is 60 days"
STRENGTHS = (0.7, 1.4, 2.3, 3.5, 4.6)
STORAGES = ("float32", "bfloat16", "float16", "int8", "int4")
PARTS = ("fits", "storage", "strengths", "afterwards")
PIECE, TOKENS = 256, 1064
WINDOWS = {0: (0, 64), 256: (192, 320), 1000: (936, 1064)}
"""Distance of a certificate to the tokens after the memory that are compared with it."""


def main() -> None:
    """Prints all tables."""
    torch.set_num_threads(1)
    options = _options()
    model, tokenizer = kv.load(options.model)
    queries = _queries(model, tokenizer, options.store)
    memory = kv.capture(model, tokenizer, CONTEXT)
    tables: dict[str, Callable[[], Any]] = {
        "fits": lambda: _fits(memory, queries),
        "storage": lambda: _storages(memory, queries),
        "strengths": lambda: _strengths(memory, queries),
        "afterwards": lambda: _afterwards(model, tokenizer, memory, queries),
    }
    found = {part: tables[part]() for part in options.parts}
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--store", help="folder of a store that keeps the calibration")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="tables to print (all)"
    )
    return parser.parse_args()


def _queries(model: Any, tokenizer: Any, folder: str | None) -> KVMemory:
    store = kv.Store(folder) if folder else None
    try:
        if store is not None:
            return store.get("queries")
    except NotFound:
        pass
    started = time.perf_counter()
    queries = kv.calibrate(model, tokenizer)
    seconds, size = time.perf_counter() - started, queries.nbytes / 2**20
    print(f"calibrated in {seconds:.1f} s, {size:.0f} MiB with its zero values", flush=True)
    if store is not None:
        store.put(queries, "queries")
    return queries


def _emphasised(memory: KVMemory, strength: float) -> KVMemory:
    edited: KVMemory = kv.editors.Emphasize(span=SPAN, strength=strength)(memory)
    return edited


def _row(name: str, certificate: Certificate) -> dict[str, Any]:
    """Prints one line, and returns its figures."""
    heads = certificate.heads
    distances = sorted({row.distance for head in heads for row in head.distances})
    rows = {d: [r for h in heads for r in h.distances if r.distance == d] for d in distances}
    mean, spread = certificate.share()
    kv_mean, kv_spread = certificate.share(by="kv")
    means = torch.tensor([head.total.mean for head in heads])
    spreads = torch.tensor([head.total.spread for head in heads])
    figures = {
        "mean within 0.03": [mean, kv_mean],
        "spread up to 0.10": [spread, kv_spread],
        "least mean": float(means.min()),
        "most mean": float(means.max()),
        "median spread": float(spreads.median()),
        "90 % spread": float(spreads.quantile(0.9)),
        "most spread": float(spreads.max()),
        "worst": max(head.total.worst for head in heads),
        "KL": sum(head.total.divergence for head in heads) / len(heads),
        "KV heads failed": len(certificate.failed),
        "by distance": {
            d: [
                sum(abs(r.mean - 1) <= 0.03 for r in rows[d]) / len(rows[d]),
                sum(r.spread <= 0.10 for r in rows[d]) / len(rows[d]),
            ]
            for d in distances
        },
    }
    shares = ", ".join(f"{d}: {a:.3f}/{b:.3f}" for d, (a, b) in figures["by distance"].items())
    print(
        f"| {name} | {mean:.3f}, {kv_mean:.3f} | {spread:.3f}, {kv_spread:.3f} | "
        f"{figures['least mean']:.3f}–{figures['most mean']:.3f} | "
        f"{figures['median spread']:.3f} / "
        f"{figures['90 % spread']:.3f} / {figures['most spread']:.3f} | {figures['worst']:.2f} | "
        f"{figures['KL']:.4f} | {shares} | {figures['KV heads failed']} |",
        flush=True,
    )
    return figures


def _title(name: str) -> None:
    print(
        f"\n| {name} | mean within 0.03: query, KV heads | spread up to 0.10 | means "
        "| spread: median / 90 % / most | worst | KL of attention | both shares by distance "
        "| KV heads failed |"
    )
    print("|---|---|---|---|---|---|---|---|---|")


def _fits(memory: KVMemory, queries: KVMemory) -> dict[str, Any]:
    found = {}
    for strength in (2.3, 4.6):
        _title(f"fit at b = {strength}")
        biased = _emphasised(memory, strength)
        editors = {fit: Compile(fit=fit) for fit in FITS}
        editors |= {f"balanced, balance {b:g}": Compile(balance=b) for b in (2.0, 10.0)}
        for name, editor in editors.items():
            found[f"{name}, {strength}"] = _row(name, certify(biased, queries, editor))
    return found


def _storages(memory: KVMemory, queries: KVMemory) -> dict[str, Any]:
    _title("storage at b = 4.6")
    biased = _emphasised(memory, 4.6)
    return {s: _row(s, certify(biased, queries, Compile(storage=s))) for s in STORAGES}


def _strengths(memory: KVMemory, queries: KVMemory) -> dict[str, Any]:
    _title("strength b")
    return {
        str(b): _row(f"{b}", certify(_emphasised(memory, b), queries, Compile())) for b in STRENGTHS
    }


def _texts() -> Iterator[tuple[str, str]]:
    yield "generic text, held out", str(generic_texts("held", chat=False)[0])
    yield "docs/store.md", (ROOT / "docs/store.md").read_text(encoding="utf-8")


def _afterwards(
    model: Any, tokenizer: Any, memory: KVMemory, queries: KVMemory
) -> list[dict[str, Any]]:
    found = []
    print(
        "\n| text | b | distance | mass measured: before, exact, compiled | exact - compiled mass: "
        "mean / most | achieved per unit: error of the certificate, mean / most | compiled mass by "
        "the certificate's mean: error, mean / most |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, text in _texts():
        ids = tokenizer(" " + text, add_special_tokens=False, return_tensors="pt").input_ids
        ids = ids[:, :TOKENS]
        plain = _read(model, memory, memory, ids)
        for strength in (2.3, 4.6):
            biased = _emphasised(memory, strength)
            certificate = certify(biased, queries, Compile())
            compiled = Compile()(biased, queries)
            _check_plain(compiled, memory)
            runs = {"exact": _read(model, biased, memory, ids)}
            runs["compiled"] = _read(model, compiled, memory, ids)
            found += _compare(name, strength, certificate, plain, runs)
            if strength < STRENGTHS[-1]:
                continue
            rounded = compiled.to(dtype=torch.bfloat16).to(dtype=torch.float32)
            runs["compiled, bfloat16"] = _read(model, rounded, memory, ids)
            runs["compiled, int8"] = _read(model, approximate(compiled, "int8")[0], memory, ids)
            runs["exact, int8"] = _read(model, approximate(biased, "int8")[0], memory, ids)
            found.append(_divergences(name, strength, plain, runs))
    for row in found:
        if "KL" in row:
            print(f"{row['text']}, b = {row['strength']}: KL of next tokens, nats: {row['KL']}")
    return found


def _check_plain(compiled: KVMemory, plain: KVMemory) -> None:
    """Stops unless the compiled memory is plain keys and values of the plain memory's shapes."""
    for ours, theirs in zip(compiled.layers.values(), plain.layers.values(), strict=True):
        same = (ours.keys.shape, ours.keys.dtype) == (theirs.keys.shape, theirs.keys.dtype)
        if ours.bias is not None or not same or ours.values is not theirs.values:
            raise SystemExit("the compiled memory is not plain keys and values of the same shapes")
    if not compiled.servable():
        raise SystemExit(f"the compiled memory can't be served: {compiled.servable().reasons}")


@torch.no_grad()
def _read(model: Any, memory: KVMemory, plain: KVMemory, ids: torch.Tensor) -> dict[str, Any]:
    """Reads ``ids`` over a memory.

    Returns:
        ``share`` ``[layer, query_head, query]`` of the memory's attention that the span gets;
        ``gain``, the change of the span's log-mass by the memory's keys against the plain ones,
        for the very queries that were made; and log-probabilities ``[query, vocabulary]``.
    """
    inside = memory.find(SPAN).mask(plain.layers[0])
    groups = {"span": inside, "memory": torch.ones_like(inside)}
    shares, gains, logits = [], [], []
    with kv.attach(model, memory) as session:
        for piece in ids.split(PIECE, dim=1):
            with kv.tap(model, ["queries", "mass"], groups=groups) as tap:
                logits.append(session.forward(piece)[0].log_softmax(-1))
            mass = torch.stack([tap["mass", i][:, 0] for i in tap.layers])
            shares.append(mass[:, 0] / mass[:, 1])
            gains.append(torch.stack([_gain(memory, plain, i, tap, inside) for i in tap.layers]))
    return {
        "share": torch.cat(shares, -1),
        "gain": torch.cat(gains, -1),
        "log": torch.cat(logits),
    }


def _gain(
    memory: KVMemory, plain: KVMemory, index: int, tap: Any, inside: torch.Tensor
) -> torch.Tensor:
    spec = memory.model.layers[index]
    queries = tap["queries", index][0] * spec.scale
    found = []
    for head in range(spec.query_heads):
        pair = [
            attention_logits(
                queries[head], kept.layers[index].keys[head // spec.group], spec, inside
            )
            for kept in (memory, plain)
        ]
        found.append(pair[0].logsumexp(-1) - pair[1].logsumexp(-1))
    return torch.stack(found)


def _compare(
    name: str,
    strength: float,
    certificate: Certificate,
    plain: dict[str, Any],
    runs: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    found = []
    for distance, (start, stop) in WINDOWS.items():

        def over(tensor: torch.Tensor, start: int = start, stop: int = stop) -> torch.Tensor:
            return tensor[..., start:stop].mean(-1).flatten().double()

        rows = [r for h in certificate.heads for r in h.distances if r.distance == distance]
        mean = torch.tensor([row.mean for row in rows])
        run = runs["compiled"]
        unit = over(run["gain"]) / strength
        # The same queries without the deltas, then with the bias that the certificate promises.
        without = run["share"].double().logit() - run["gain"]
        promised = mean.view(*without.shape[:2], 1) * strength
        exact, compiled = over(runs["exact"]["share"]), over(run["share"])
        errors = {
            "exact - compiled": (exact - compiled).abs(),
            "unit error": (unit - mean).abs(),
            "mass error": (over((without + promised).sigmoid()) - compiled).abs(),
        }
        masses = [float(x.mean()) for x in (over(plain["share"]), exact, compiled)]
        pairs = {key: [float(x.mean()), float(x.max())] for key, x in errors.items()}
        found.append(
            {"text": name, "strength": strength, "distance": distance, "mass": masses, **pairs}
        )
        cells = [", ".join(f"{mass:.4f}" for mass in masses)]
        cells += [f"{average:.4f} / {most:.4f}" for average, most in pairs.values()]
        print(f"| {name} | {strength} | {distance} | {' | '.join(cells)} |", flush=True)
    return found


def _divergences(
    name: str, strength: float, plain: dict[str, Any], runs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    def kl(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
        return float((ours["log"].exp() * (ours["log"] - theirs["log"])).sum(-1).mean())

    pairs = {
        "exact to plain": kl(runs["exact"], plain),
        "exact to compiled": kl(runs["exact"], runs["compiled"]),
        "compiled to compiled in bfloat16": kl(runs["compiled"], runs["compiled, bfloat16"]),
        "compiled to compiled in int8": kl(runs["compiled"], runs["compiled, int8"]),
        "exact to exact in int8": kl(runs["exact"], runs["exact, int8"]),
    }
    rounded = {pair: round(value, 5) for pair, value in pairs.items()}
    return {"text": name, "strength": strength, "KL": rounded}


if __name__ == "__main__":
    main()
