"""``kvedit extract``: what two sets of texts differ by, as a delta in the store."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from kvedit.runs.verbs.base import Outcome, Verb, table
from kvedit.runs.verbs.options import (
    add_model,
    add_put,
    add_store,
    load_model,
    newest,
    note,
    open_store,
    positive,
    put_options,
)
from kvedit.runs.verbs.parameters import parse_value, read_settings

if TYPE_CHECKING:
    from kvedit.runs.extraction import Extracted, Extraction
    from kvedit.steering import Contrast

__all__ = ["EXTRACT"]

_TEMPLATE = "few_shot_reasoning"
_LAYERS = 8


def _add(parser: ArgumentParser) -> None:
    parser.add_argument(
        "contrast",
        metavar="PAIRS",
        help='a .jsonl file of {"positive": …, "negative": …} (texts, or lists of messages), a '
        ".json file, or a template: few_shot_reasoning, persona, refusal, style_pairs",
    )
    parser.add_argument(
        "--as", dest="name", required=True, metavar="NAME", help="name of the delta in the store"
    )
    parser.add_argument(
        "--folder",
        metavar="FOLDER",
        help="keeps what was read: the same command goes on after a kill, and another estimator "
        "needs no further reading",
    )
    parser.add_argument(
        "--sites",
        nargs="+",
        default=["keys", "values"],
        choices=("keys", "values", "residual", "attention"),
        help="what is read (default: keys values)",
    )
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help="default: all")
    parser.add_argument(
        "--read",
        default="last",
        metavar="TOKENS",
        help="last (default), mean, a number from the end (--read=-2), a text, or a query such as "
        "'{role: system}'",
    )
    parser.add_argument(
        "--estimator",
        default="mean",
        metavar="NAME",
        help="mean (default), pca, logistic, lda; or '{name: pca, unit: true}'",
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="rows at once (8)")
    parser.add_argument(
        "--prune",
        type=parse_value,
        metavar="KEEP",
        help="KV heads to keep, those with the longest values: a number, or a share such as 0.25",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="parameters of the template: pairs=16 shots=3 (kvedit/conf/contrast/), or "
        "prompt=true for a file of chats",
    )
    parser.add_argument("--out", metavar="FILE", help="also write it as safetensors")
    parser.add_argument(
        "--every", action="store_true", help=f"show all layers, not the {_LAYERS} longest of a site"
    )
    add_store(parser)
    add_put(parser)
    add_model(parser, default="smollm2-135m")


def _run(args: Namespace) -> Outcome:
    from kvedit.models.packaged import PACKAGED
    from kvedit.runs.steps import Loaded
    from kvedit.store.refs import check_name

    # Everything that can be wrong without the model is found before the model is loaded.
    name = check_name(args.name)
    args.message = args.message or shlex.join(["extract", args.contrast, *args.set])
    options, extraction, contrast = put_options(args), _extraction(args), _contrast(args)
    store = open_store(args)
    expect = None if args.force else newest(store, name)
    loaded = Loaded(*load_model(args.model or PACKAGED, args.dtype, args.device, args.attn), 0.0)
    found = extraction.run(loaded, contrast, progress=sys.stderr.isatty())
    if found.report is None:
        note("one pair can't be held out: nothing tells how well the delta separates")
    metrics = found.measures()
    record = store.put(found.delta.operand(), name, expect=expect, metrics=metrics, **options)
    written = None if args.out is None else str(found.delta.save(args.out))
    data = {**vars(record), **found.to_json(), "file": written}
    lines = [str(record), _shown(found, args.every)]
    lines += [f"also in {written}"] if written else []
    return Outcome(data, "\n".join(lines))


def _extraction(args: Namespace) -> Extraction:
    from kvedit.runs.extraction import read_extraction

    names = ("sites", "layers", "batch", "folder", "prune")
    section: dict[str, Any] = {name: getattr(args, name) for name in names}
    section |= {"read": parse_value(args.read), "estimator": parse_value(args.estimator)}
    return read_extraction(section)


def _contrast(args: Namespace) -> Contrast:
    from kvedit.runs.contrasting import TEMPLATES, contrast_of

    template = args.contrast in TEMPLATES and args.contrast != "file"
    start = {"template": args.contrast} if template else {"template": "file", "path": args.contrast}
    return contrast_of({**read_settings(args.set), **start})


def _shown(found: Extracted, every: bool) -> str:
    """Returns the longest vectors of each site, with their shares of held-out pairs."""
    from kvedit.runs.extraction import COLUMNS

    rows = found.rows() if every else found.longest(_LAYERS)
    left = len(found.rows()) - len(rows)
    pairs = len(found.contrast.pairs) if found.contrast else 0
    more = f"; {left} more layers with --every, all heads with --json" if left else ""
    told = (
        f"{pairs} pairs; accuracy and order are of held-out pairs, of each layer's best head{more}"
    )
    return f"{table(COLUMNS, rows)}\n{told}"


EXTRACT = Verb(
    "extract",
    "find a steering delta between two sets of texts and store it",
    _add,
    _run,
    "kvedit extract few_shot_reasoning --set pairs=16 shots=3 --as steps --folder read/steps",
)
