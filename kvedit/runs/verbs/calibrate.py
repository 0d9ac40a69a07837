"""``kvedit calibrate``: what editors compute with, made once per model and kept in the store."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import add_model, add_store, load_model, open_store

__all__ = ["CALIBRATE"]


def _add(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--kind",
        choices=("queries", "projectors", "experts"),
        default="queries",
        help="query samples for `compile` (default), projectors for `seka`, experts for `ada_seka`",
    )
    parser.add_argument("--force", action="store_true", help="make it anew where there is one")
    add_store(parser)
    add_model(parser, default="smollm2-135m")


def _run(args: Namespace) -> Outcome:
    from kvedit.models.packaged import PACKAGED
    from kvedit.runs.operands import make, operand_name, stored

    store = open_store(args)
    model, tokenizer = load_model(args.model or PACKAGED, args.dtype, args.device, args.attn)
    from kvedit.models import inspect

    spec = inspect(model, tokenizer).spec
    name = operand_name(args.kind, spec)
    if not args.force and stored(store, args.kind, spec) is not None:
        record = store.log(name)[0]
        return Outcome(record, f"{record} is there already; --force makes it anew")
    operand = make(args.kind, model, tokenizer)
    record = store.put(operand, name, message=f"{args.kind} of {spec.name}")
    return Outcome(record, str(record))


CALIBRATE = Verb(
    "calibrate",
    "make what an editor computes with (once per model)",
    _add,
    _run,
    "kvedit calibrate --model smollm2-135m --kind queries",
)
