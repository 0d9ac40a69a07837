"""The ``kvedit`` command: one verb per task. Results go to stdout, everything else to stderr.

Exit status: 0 done, 1 refused or failed (one line on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import kvedit
from kvedit.errors import KVEditError
from kvedit.runs.verbs.ask import ASK, SCORE
from kvedit.runs.verbs.base import Verb, to_json
from kvedit.runs.verbs.bench import BENCH
from kvedit.runs.verbs.calibrate import CALIBRATE
from kvedit.runs.verbs.capture import CAPTURE
from kvedit.runs.verbs.carry import EXPORT, IMPORT
from kvedit.runs.verbs.compose import COMPOSE
from kvedit.runs.verbs.diff import DIFF
from kvedit.runs.verbs.doctor import DOCTOR
from kvedit.runs.verbs.edit import EDIT
from kvedit.runs.verbs.editors import EDITORS
from kvedit.runs.verbs.extract import EXTRACT
from kvedit.runs.verbs.family import ANCESTORS, DESCENDANTS
from kvedit.runs.verbs.look import LOG, LS, RM, SHOW
from kvedit.runs.verbs.names import ANNOTATE, BRANCH, PIN, ROLLBACK, TAG, UNPIN
from kvedit.runs.verbs.profile import PROFILE
from kvedit.runs.verbs.remote import EVICT, PULL, PUSH, SYNC
from kvedit.runs.verbs.replay import REPLAY
from kvedit.runs.verbs.serve import SERVE
from kvedit.runs.verbs.study import STUDY
from kvedit.runs.verbs.train import TRAIN
from kvedit.runs.verbs.upkeep import DU, FSCK, GC, STATS

__all__ = ["VERBS", "build_parser", "main"]

VERBS: tuple[Verb, ...] = (
    CAPTURE,
    EDIT,
    CALIBRATE,
    EXTRACT,
    STUDY,
    TRAIN,
    COMPOSE,
    ASK,
    SCORE,
    SERVE,
    LS,
    SHOW,
    LOG,
    DIFF,
    REPLAY,
    ANCESTORS,
    DESCENDANTS,
    TAG,
    BRANCH,
    ROLLBACK,
    ANNOTATE,
    PIN,
    UNPIN,
    RM,
    EXPORT,
    IMPORT,
    PUSH,
    PULL,
    SYNC,
    EVICT,
    GC,
    FSCK,
    DU,
    STATS,
    EDITORS,
    PROFILE,
    BENCH,
    DOCTOR,
)
"""All verbs, in the order of the help."""

_INTERRUPTED = 130
_BROKEN_PIPE = 141  # as a program that the signal ends


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status of one verb, after running it.

    Args:
        argv: the arguments; None takes those of the process.
    """
    args = build_parser().parse_args(argv)
    try:
        outcome = args.verb.run(args)
        shown = to_json(outcome.data) if args.json else outcome.text
        if shown:
            print(shown)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_stdout()
        return _BROKEN_PIPE
    except (KVEditError, OSError) as error:
        # One line, whatever the message quotes: scripts read stderr by line.
        print(f"kvedit: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kvedit: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return int(outcome.code)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all verbs; it imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="kvedit",
        description="Capture, edit, store and reuse the KV memory of language models.",
        epilog="`kvedit VERB --help` explains a verb. Everything takes --json.",
    )
    parser.add_argument("--version", action="version", version=f"kvedit {kvedit.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        one = verbs.add_parser(
            verb.name,
            help=verb.summary,
            description=f"{verb.summary[0].upper()}{verb.summary[1:]}.",
            epilog=f"example: {verb.example}",
        )
        verb.add(one)
        one.add_argument("--json", action="store_true", help="print one JSON document")
        one.set_defaults(verb=verb)
    return parser


def _leave_stdout() -> None:
    # The reader is gone; at exit, Python would try to flush once more and complain.
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(main())
