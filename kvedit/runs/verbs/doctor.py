"""``kvedit doctor``: whether this installation and this machine are as kvedit wants them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from kvedit.runs.verbs.base import Outcome, Verb

__all__ = ["DOCTOR"]


def _add(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--store", metavar="FOLDER", help="also read every version in this store and check it"
    )


def _run(args: Namespace) -> Outcome:
    from kvedit.runs.doctor import examine

    findings = examine(args.store)
    healthy = all(finding.ok for finding in findings if finding.required)
    width = max(len(finding.subject) for finding in findings)
    lines = [
        f"{'ok' if f.ok else 'BAD' if f.required else '--':<3} {f.subject:<{width}}  {f.text}"
        for f in findings
    ]
    data = {"healthy": healthy, "findings": findings}
    return Outcome(data, "\n".join(lines), code=0 if healthy else 1)


DOCTOR = Verb(
    "doctor",
    "check versions, devices, extras, the packaged model and a store",
    _add,
    _run,
    "kvedit doctor --store memories",
)
