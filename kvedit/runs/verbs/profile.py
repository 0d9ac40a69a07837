"""``kvedit profile``: which heads of a model carry emphasis, as a head atlas."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument
from kvedit.runs.verbs.base import Outcome, Verb, table
from kvedit.runs.verbs.options import add_model, load_model, note, positive

if TYPE_CHECKING:
    from kvedit.evals.profiling import HeadAtlas

__all__ = ["PROFILE"]


def _add(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--probes",
        required=True,
        metavar="FILE",
        help="JSON: a list of {context, span, prompt, wanted, rival, unrelated}; the last is "
        "optional, and measures what steering does to something else",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the atlas; finished probes are kept beside it, so that a second start goes on",
    )
    add_model(parser, default="smollm2-135m")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--strength", type=float, metavar="NATS", help="bias on the span")
    how.add_argument("--alpha", type=float, help="PASTA's factor in (0, 1): bias -log(alpha)")
    parser.add_argument(
        "--kind",
        choices=("kv", "query"),
        default="kv",
        help="KV heads with their groups (default), or single query heads",
    )
    parser.add_argument(
        "--search",
        choices=("heads", "layers", "coarse", "greedy"),
        default="heads",
        help="each head alone (default), each layer, the heads of the best layers, or heads "
        "added one by one",
    )
    parser.add_argument(
        "--rerun",
        choices=("last", "prompt"),
        default="last",
        help="what is read under the bias: the prompt's last token (default, fast) or all of it",
    )
    parser.add_argument(
        "--continuation",
        choices=("whole", "first"),
        default="whole",
        help="score whole continuations (default), or their first tokens as PASTA does",
    )
    parser.add_argument(
        "--layers", type=positive, default=4, metavar="N", help="coarse: layers to look into (4)"
    )
    parser.add_argument(
        "--count", type=positive, default=10, metavar="N", help="greedy: heads at most (10)"
    )
    parser.add_argument(
        "--pool", type=positive, default=24, metavar="N", help="greedy: best heads to try (24)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (0)")
    parser.add_argument("--task", default="", metavar="NAME", help="what the probes are")
    parser.add_argument(
        "--top", type=positive, default=10, metavar="K", help="sets to show and to export (10)"
    )
    parser.add_argument(
        "--pasta", metavar="FILE", help="also write the first K as pastalib's head file"
    )


def _run(args: Namespace) -> Outcome:
    strength = _strength(args)
    for name in ("out", "pasta"):
        place = getattr(args, name)
        if place and not Path(place).resolve().parent.is_dir():
            raise InvalidArgument(f"--{name} {place}: there is no such folder")
    from kvedit.evals.profiling import Setting, profile, read_probes

    setting = Setting(strength, args.rerun, args.continuation)
    probes = read_probes(args.probes)
    model, tokenizer = load_model(args.model or "smollm2-135m", args.dtype, args.device, args.attn)
    options = {name: getattr(args, name) for name in ("kind", "search", "layers", "count", "pool")}
    atlas = profile(
        model, tokenizer, probes, setting, **options,
        seed=args.seed, task=args.task, out=args.out, progress=True,
    )  # fmt: skip
    shown = min(args.top, len(atlas.scores))
    chosen = atlas.top(shown)
    if args.pasta:
        chosen.to_query(atlas.model).write_pasta(args.pasta)
    if all(probe.unrelated is None for probe in probes):
        note("no probe has an unrelated prompt: what steering these heads costs was not measured")
    return Outcome({**atlas.to_json(), "top": chosen.to_json()}, _shown(atlas, shown))


def _strength(args: Namespace) -> float:
    if args.alpha is None:
        return float(args.strength)
    if not 0 < args.alpha < 1:
        raise InvalidArgument(f"--alpha must lie between 0 and 1, found {args.alpha}")
    return -math.log(args.alpha)


def _shown(atlas: HeadAtlas, count: int) -> str:
    rows: list[tuple[Any, ...]] = []
    for score in atlas.scores[:count]:
        low, high = score.gain_interval or (score.gain, score.gain)
        names = [f"{layer}.{head}" for layer, head in score.heads.pairs]
        more = ["…"] if len(names) > 6 else []
        cost = "" if score.kl is None else f"{score.kl:.3g}"
        numbers = f"{score.gain:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{score.efficacy:.0%}"
        rows.append((" ".join(names[:6] + more), *numbers, cost))
    head = (f"layer.{atlas.kind} head", "gain, nats", "95 %", "efficacy", "unrelated KL")
    summary = (
        f"{len(atlas.scores)} sets on {atlas.n} probes in {atlas.minutes:.1f} min; unsteered: "
        f"margin {atlas.base_margin:+.3f} nats, efficacy {atlas.base_efficacy:.0%}"
    )
    return f"{table(head, rows)}\n{summary}"


PROFILE = Verb(
    "profile",
    "find the attention heads that carry emphasis",
    _add,
    _run,
    "kvedit profile --probes probes.json --strength 4.6 --kind kv --out atlas.json",
)
