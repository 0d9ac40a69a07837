"""``kvedit train``: a few slots are trained to stand for a stored memory, or for texts."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.runs.verbs.base import Outcome, Verb, table
from kvedit.runs.verbs.options import (
    REF,
    add_model,
    add_put,
    add_store,
    newest,
    open_store,
    put_options,
)
from kvedit.runs.verbs.parameters import read_settings
from kvedit.runs.verbs.starts import ChosenStart
from kvedit.runs.verbs.study import add_form, loaded_of, material_of

if TYPE_CHECKING:
    from kvedit.cartridges import Sample
    from kvedit.memory import KVMemory
    from kvedit.runs.beside import Other
    from kvedit.runs.steps import Loaded
    from kvedit.store import Store

__all__ = ["TRAIN"]

_START = ["attention_matching", "budget=0.125"]
_SAMPLES, _CHECKPOINTS = "samples", "checkpoints"
_NO_BETTER = (
    "\nno evaluation was better than the start, so this is what is stored: make more samples, try "
    "another lr or more steps, or take the last step with --set best=false"
)


def _add(parser: ArgumentParser) -> None:
    context = parser.add_mutually_exclusive_group(required=True)
    context.add_argument(
        "ref", nargs="?", help=f"the stored memory that the cartridge shall stand for: {REF}"
    )
    context.add_argument(
        "--text", nargs="+", metavar="FILE", help="texts in its place: files or folders"
    )
    add_form(parser)
    on = parser.add_mutually_exclusive_group(required=True)
    on.add_argument("--samples", metavar="FOLDER", help="samples that `kvedit study` made")
    on.add_argument(
        "--pairs",
        metavar="FILE",
        help='questions of your own: JSONL of {"question": …, "answer": …}; without an answer the '
        "model answers over the whole context",
    )
    parser.add_argument(
        "--as", dest="name", required=True, metavar="NAME", help="name of the result in the store"
    )
    parser.add_argument(
        "--folder",
        required=True,
        metavar="FOLDER",
        help="of this training alone: checkpoints, from which the same command goes on, and the "
        "samples of --pairs",
    )
    parser.add_argument(
        "--start",
        nargs="+",
        default=_START,
        metavar=("NAME", "KEY=VALUE"),
        help="where to start: first_tokens slots=64, text_tokens, random_vectors, sampled_chunks "
        "slots=64 chunk=16, summary slots=128, stored ref=NAME, or any editor (default: "
        f"{' '.join(_START)})",
    )
    parser.add_argument(
        "--held-out", type=_share, default=0.15, metavar="SHARE", help="of the samples; 0 is none"
    )
    parser.add_argument(
        "--distractor",
        action="append",
        default=[],
        metavar="REF",
        help="a stored memory that stands beside it in some steps; repeatable, with "
        "--set distractors=FRACTION",
    )
    parser.add_argument(
        "--distractor-text", action="append", default=[], metavar="FILE", help="the same of a text"
    )
    parser.add_argument(
        "--preset", choices=("default", "small"), default="default", help="how it is trained"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="any key of kvedit/conf/train/default.yaml: steps=40 lr=0.005 freeze.keys=true",
    )
    add_store(parser)
    add_put(parser)
    add_model(parser, default="the one that made the memory, or smollm2-135m for texts")


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise ArgumentTypeError(f"must be 0 or above and below 1, found {text}")
    return share


def _run(args: Namespace) -> Outcome:
    from kvedit.cartridges import train
    from kvedit.runs.presets import preset
    from kvedit.runs.steps import capture
    from kvedit.runs.training import losses, read_plan
    from kvedit.store.refs import check_name

    # Everything that can be wrong without the model is found before the model is loaded.
    name = check_name(args.name)
    args.message = args.message or shlex.join(["train", *args.start])
    options, chosen = put_options(args), ChosenStart.of(args.start)
    plan = read_plan(preset("train", args.preset, read_settings(args.set)))
    others = _others(args, plan.distractors)
    given = _Given.of(args)
    store = open_store(args)
    expect = None if args.force else newest(store, name)
    loaded, full = _context(args, store)
    beside = [
        other.memory(store.get, lambda text: capture(loaded, text.context(loaded.tokenizer)))
        for other in others
    ]
    begun = chosen.make(loaded, full, store)
    samples, held_out = given.split(loaded, full)
    teacher = full if plan.objective.attention else None
    memory = train(
        loaded.model, begun, samples, plan, tokenizer=loaded.tokenizer, held_out=held_out,
        distractors=beside, teacher=teacher,
        folder=Path(args.folder) / _CHECKPOINTS, progress=sys.stderr.isatty(),
    )  # fmt: skip
    measured = held_out or samples
    before, after = (losses(loaded, each, measured, plan, teacher) for each in (begun, memory))
    where = "held_out" if held_out else "train"
    metrics = {f"{where}/{key}": value for key, value in after.items()}
    record = store.put(memory, name, expect=expect, metrics=metrics, **options)
    data = {
        **vars(record),
        "start": chosen.to_json(),
        "slots": memory.slots,
        "full_slots": full.slots,
        "samples": len(samples),
        "held_out": len(held_out),
        "measured_on": where,
        "before": before,
        "after": after,
    }
    return Outcome(data, f"{record}\n{_shown(data)}")


def _context(args: Namespace, store: Store) -> tuple[Loaded, KVMemory]:
    """Returns the model, and the memory of what the cartridge shall stand for."""
    from kvedit.runs.steps import capture

    if args.text:
        material = material_of(args.text, args, args.as_chat)
        loaded = loaded_of(args, None)
        return loaded, capture(loaded, material.context(loaded.tokenizer))
    full = store.get(args.ref)
    return loaded_of(args, full), full


def _others(args: Namespace, fraction: float) -> tuple[Other, ...]:
    from kvedit.runs.beside import read_others

    shown = {"role": "system" if args.as_chat else None, "instruction": args.intro}
    texts = [{"path": path, **shown} for path in args.distractor_text]
    return read_others([*({"ref": ref} for ref in args.distractor), *texts], fraction)


@dataclass(frozen=True)
class _Given:
    """What to train on: a folder of samples, or questions of which one is made."""

    samples: Any
    pairs: Any
    folder: Path
    share: float

    @classmethod
    def of(cls, args: Namespace) -> _Given:
        from kvedit.cartridges.study import SampleSet
        from kvedit.runs.training import read_pairs

        made = SampleSet(args.samples) if args.samples else None
        pairs = read_pairs(Path(args.pairs)) if args.pairs else None
        return cls(made, pairs, Path(args.folder) / _SAMPLES, args.held_out)

    def split(self, loaded: Loaded, full: KVMemory) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """Returns samples for training, and those that are held out."""
        from kvedit.runs.studying import check_turns
        from kvedit.runs.training import given_samples

        made = self.samples
        if made is None:
            shown = sys.stderr.isatty()
            made = given_samples(loaded, self.pairs, full, self.folder, progress=shown)
        check_turns(loaded, made, full.source)
        return made.split(self.share) if self.share else (made, ())


def _shown(data: Mapping[str, Any]) -> str:
    before, after = data["before"], data["after"]
    rows = [(key, f"{before[key]:.4f}", f"{after[key]:.4f}") for key in before]
    held = data["held_out"]
    place = f"the {held} held out" if held else "these themselves"
    sizes = f"{data['slots']} slots for {data['full_slots']}"
    return (
        f"{sizes}, trained on {data['samples']} samples; nats per answer token, on {place}:\n"
        + table(("", "before", "after"), rows)
        + (_NO_BETTER if held and before == after else "")
    )


TRAIN = Verb(
    "train",
    "train a cartridge for a stored memory or for texts, and store it",
    _add,
    _run,
    "kvedit train handbook --samples studies/handbook --start first_tokens slots=64 "
    "--folder runs/handbook --as handbook-64 --set steps=40 lr=0.005",
)
