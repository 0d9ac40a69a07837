"""Equal KL: one target, every editor that has a strength; chosen on one part, read on the other.

    python experiments/equal_kl/run.py FOLDER main --minutes 70
    python experiments/equal_kl/run.py FOLDER table

``main`` does what is missing: the continuous methods, the discrete ones, and the continuous ones
again with the parts changed about. Journals in FOLDER hold every KL, prompt by prompt: a killed run
goes on where it was. It begins no method when the minutes are over.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from methods import LATER, Method, continuous, discrete  # beside this file
from setup import COARSE_TOLERANCE, DESIGNS, SEED, TARGET, TOLERANCE, WIDTH, Lab  # beside this file
from table import tables  # beside this file

from kvedit.errors import InvalidArgument, KVEditError
from kvedit.evals import CalibratedStrength, calibrate_strength


def calibrated(lab: Lab, name: str, method: Method, **options: Any) -> CalibratedStrength:
    """Returns the strength of a method, with its own journal."""
    return calibrate_strength(
        method.apply, lab.bystanders[method.hold], TARGET, name=name, seed=SEED,
        path=lab.folder / f"{name}.jsonl", **options,
    )  # fmt: skip


def bracket(lab: Lab, name: str, method: Method) -> tuple[float, float]:
    """Returns where the real search begins, from a few prompts of the choosing part."""
    # A factor of 1 changes nothing, and a bias or mass of 0.
    least = 1.0 if method.unit in ("factor", "multiplier") else 1e-3
    options = {"parts": lab.coarse, "grow": method.grow, "tolerance": COARSE_TOLERANCE}
    try:
        found = calibrated(lab, name, method, bracket=method.bracket, scan=2, most=10, **options)
    except InvalidArgument:
        # What was guessed from the first look is beside the target: from nothing, then.
        whole = (least, method.bracket[1])
        found = calibrated(lab, name, method, bracket=whole, scan=2, most=14, **options)
    low, high = (least + (found.strength - least) * (1 + side * WIDTH) for side in (-1, 1))
    return low, high


def fine(lab: Lab, name: str, method: Method, swapped: bool) -> CalibratedStrength:
    """Returns the strength by one part of the prompts, held against the other."""
    parts = lab.parts[::-1] if swapped else lab.parts
    ends = bracket(lab, name, method)
    try:
        return calibrated(lab, name, method, bracket=ends, parts=parts, scan=2, grow=0,
                          tolerance=TOLERANCE, most=8)  # fmt: skip
    except InvalidArgument:
        # The few prompts were not like the rest: once more from a wide bracket.
        middle, half = sum(ends) / 2, (ends[1] - ends[0]) / 2
        wide = (middle - 3 * half, middle + 3 * half)
        return calibrated(lab, name, method, bracket=wide, parts=parts, scan=2, grow=3,
                          tolerance=TOLERANCE, most=10)  # fmt: skip


def rungs(lab: Lab, name: str, method: Method) -> CalibratedStrength:
    """Returns both neighbours of the target on a ladder."""
    every = list(method.ladder or ())
    few = calibrated(lab, name, method, ladder=every, parts=lab.coarse)
    at = every.index(few.strength)
    near = every[max(0, at - 2) : at + 3]
    try:
        return calibrated(lab, name, method, ladder=near, parts=lab.parts, scan=2)
    except InvalidArgument:
        return calibrated(lab, name, method, ladder=every, parts=lab.parts)


def planned(lab: Lab) -> list[tuple[str, str, Callable[[], CalibratedStrength]]]:
    """Returns everything to do, in order: stage, method, and what does it."""
    ways, ladders = continuous(lab), discrete(lab)
    one = [("main", name, partial(fine, lab, name, way, False)) for name, way in ways.items()]
    steps = [("ladder", name, partial(rungs, lab, name, way)) for name, way in ladders.items()]
    back = [("swapped", name, partial(fine, lab, name, way, True)) for name, way in ways.items()]
    # Each sort keeps the order of what is equal.
    return sorted([*one, *steps], key=lambda job: job[1] in LATER) + back


def main() -> None:
    """Runs what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=("main", "table"))
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--design", choices=DESIGNS, default="first", help="a folder for each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    lab = Lab(options.folder, DESIGNS[options.design])
    jobs = planned(lab)
    path = options.folder / "found.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for stage, name, job in jobs:
        key = f"{stage}: {name}"
        if key in found or options.part == "table":
            continue
        if time.monotonic() - started > 60 * options.minutes:
            break
        clock = time.process_time()
        try:
            found[key] = job().to_json()
        except KVEditError as error:
            # A target that is out of reach is a result.
            found[key] = {"missed": str(error)}
        found[key]["seconds"] = time.process_time() - clock
        path.write_text(json.dumps(found), encoding="utf-8")
        print(key, found[key].get("error", found[key].get("missed")), flush=True)
    print(tables(lab, found))


if __name__ == "__main__":
    main()
