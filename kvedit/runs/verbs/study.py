"""``kvedit study``: a model asks itself about texts; the samples are what ``train`` trains on."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.runs.verbs.base import Outcome, Verb
from kvedit.runs.verbs.options import (
    REF,
    add_model,
    add_store,
    load_model,
    load_model_of,
    open_store,
    positive,
)
from kvedit.runs.verbs.parameters import read_settings

if TYPE_CHECKING:
    from kvedit.memory import KVMemory
    from kvedit.runs.material import Material
    from kvedit.runs.steps import Loaded
    from kvedit.runs.studying import Study

__all__ = ["STUDY", "add_form", "loaded_of", "material_of"]


def _add(parser: ArgumentParser) -> None:
    parser.add_argument(
        "text", nargs="+", metavar="FILE", help=".txt, .md or .json files, or folders of them"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="the samples; what it holds already is not made again, so that the same command "
        "goes on after a kill, and with a larger -n goes on further",
    )
    parser.add_argument("-n", "--count", type=positive, default=256, metavar="N", help="samples")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="kinds of seed prompts")
    parser.add_argument("--chunk", type=positive, metavar="N", help="tokens of a chunk at most")
    add_form(parser)
    parser.add_argument(
        "--for",
        dest="ref",
        metavar="REF",
        help=f"the stored memory that the cartridge will stand for: {REF}. Questions then follow "
        "it, as a chat or as a text; default: the texts as a context of their own",
    )
    parser.add_argument(
        "--preset",
        choices=("default", "small"),
        default="default",
        help="settings as the paper has them, or for a small model and short texts",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="any key of kvedit/conf/study/default.yaml: seed=1 answer.max_tokens=64",
    )
    add_store(parser)
    add_model(parser, default="the one that made --for, else smollm2-135m")


def add_form(parser: ArgumentParser) -> None:
    """Adds how texts are put before the model."""
    parser.add_argument(
        "--no-chat",
        dest="as_chat",
        action="store_false",
        help="texts are plain text; default: the first message of a chat where there is a template",
    )
    parser.add_argument(
        "--intro", metavar="TEXT", help="words before the texts, or around them with {text}"
    )


def material_of(paths: list[str], args: Namespace, chat: bool) -> Material:
    """Returns files and folders as a corpus.

    Raises:
        InvalidArgument: if there is no text, or a file can't be read.
    """
    from kvedit.runs.material import read_material

    return read_material(path=paths, role="system" if chat else None, instruction=args.intro)


def loaded_of(args: Namespace, memory: KVMemory | None) -> Loaded:
    """Returns the model of ``--model``, of a memory, or the packaged one."""
    from kvedit.models.packaged import PACKAGED
    from kvedit.runs.steps import Loaded

    started = time.perf_counter()
    if memory is not None:
        found = load_model_of(memory, args)
    else:
        found = load_model(args.model or PACKAGED, args.dtype, args.device, args.attn)
    return Loaded(*found, time.perf_counter() - started)


def _run(args: Namespace) -> Outcome:
    from kvedit.runs.study_pipeline import StudyReport
    from kvedit.runs.studying import study

    # Everything that can be wrong without the model is found before the model is loaded.
    memory = open_store(args).get(args.ref) if args.ref else None
    material = material_of(args.text, args, args.as_chat and _is_chat(memory))
    wanted = _study(args, material)
    loaded = loaded_of(args, memory)
    started = time.perf_counter()
    source = None if memory is None else memory.source
    made = study(
        loaded, material, wanted, Path(args.out), source=source, progress=sys.stderr.isatty()
    )
    seconds = {"study": time.perf_counter() - started}
    report = StudyReport.of(Path(args.out).name, _name(loaded), made, wanted.n, seconds)
    return Outcome(report, report.text())


def _is_chat(memory: KVMemory | None) -> bool:
    return memory is None or memory.source is None or memory.source.chat is not None


def _study(args: Namespace, material: Material) -> Study:
    from kvedit.errors import InvalidArgument
    from kvedit.runs.presets import preset
    from kvedit.runs.studying import read_study
    from kvedit.runs.targets import fill

    given = read_settings(args.set)
    changes: dict[str, Any] = {"n": args.count, "folder": args.out}
    if args.kinds:
        changes["kinds"] = args.kinds
    for key in changes:
        if key in given:
            raise InvalidArgument(f"--set {key}: there is an option for it, see --help")
    if args.chunk:
        chunking = given.setdefault("chunking", {})
        chunking.setdefault("max_tokens", args.chunk)
        chunking.setdefault("min_tokens", max(1, args.chunk // 2))
    return fill("study", read_study, preset("study", args.preset, given | changes), material)


def _name(loaded: Loaded) -> str:
    from kvedit.models.inspection import inspect

    return inspect(loaded.model, loaded.tokenizer).spec.name


STUDY = Verb(
    "study",
    "let a model ask itself about texts and keep the samples in a folder",
    _add,
    _run,
    "kvedit study handbook.txt --out studies/handbook -n 200 --preset small",
)
