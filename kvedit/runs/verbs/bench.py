"""``kvedit bench``: what capture, bias and reuse cost on this machine, as ratios."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome, Verb, to_json
from kvedit.runs.verbs.options import positive

__all__ = ["BENCH"]

_QUICK: dict[str, Any] = {"lengths": (64, 256), "pairs": 3, "decode": 8}
_FULL: dict[str, Any] = {"lengths": (256, 1024, 4096), "pairs": 5, "decode": 32}


def _add(parser: ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        choices=("model", "store"),
        default="model",
        help="capture, bias and reuse on a model (default), or the store beside safetensors",
    )
    parser.add_argument("--size", default="256MiB", help="store: keys and values (256MiB)")
    parser.add_argument(
        "--memories", type=positive, metavar="N", help="store: count tiny memories instead"
    )
    parser.add_argument(
        "--no-model", action="store_true", help="store: without the break-even against a prefill"
    )
    parser.add_argument("--model", default="smollm2-135m", help="default: smollm2-135m")
    parser.add_argument("--dtype", help="compute dtype; default: the checkpoint's")
    parser.add_argument("--device", help="for example cuda; default: cpu")
    parser.add_argument(
        "--lengths", type=_lengths, metavar="N,N,…", help="tokens of context (256,1024,4096)"
    )
    parser.add_argument(
        "--pairs", type=positive, metavar="N", help="pairs per ratio (5; 3 for prefills above 2048)"
    )
    parser.add_argument("--decode", type=positive, metavar="N", help="tokens to decode (32)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument("--quick", action="store_true", help="64,256 tokens, 3 pairs, 8 to decode")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON document there")


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({positive(part) for part in text.split(",")}))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers like 256,1024, found {text}") from error


def _run(args: Namespace) -> Outcome:
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise InvalidArgument(f"--out {args.out}: there is no such folder")
    report = _store(args) if args.what == "store" else _model(args)
    if args.out:
        Path(args.out).write_text(to_json(report) + "\n", encoding="utf-8")
    return Outcome(report, str(report))


def _store(args: Namespace) -> Any:
    import torch

    from kvedit.runs.bench.store import bench_many, bench_store
    from kvedit.store.room import parse_bytes

    torch.set_num_threads(args.threads)
    if args.memories:
        return bench_many(args.memories)
    size = parse_bytes(args.size)
    return bench_store(size, args.pairs or 7, None if args.no_model else args.model)


def _model(args: Namespace) -> Any:
    from kvedit.runs.bench import Plan, bench

    defaults = _QUICK if args.quick else _FULL
    chosen = {name: getattr(args, name) or default for name, default in defaults.items()}
    if args.pairs:
        chosen["long_pairs"] = args.pairs
    plan = Plan(args.model, dtype=args.dtype, device=args.device, threads=args.threads, **chosen)
    return bench(plan)


BENCH = Verb(
    "bench",
    "measure capture, attention bias and reuse against the plain model",
    _add,
    _run,
    "kvedit bench --quick",
)
