"""Kills writers and readers at random moments, many times, and counts what was lost.

python benchmarks/kill_rounds.py --rounds 200
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from kvedit.testing.killing import kill_round


def main() -> None:
    """Runs the rounds and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--durability", default="process")
    args = parser.parse_args()
    torch.set_num_threads(1)
    totals: Counter[str] = Counter()
    jobs: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(range(args.rounds)):
            found = kill_round(Path(folder) / str(number), args.seed + number, args.durability)
            totals.update(acknowledged=found.acknowledged, checked=found.checked, reads=found.reads)
            for kind in ("lost", "torn", "orphans", "unhealthy", "failed"):
                totals[kind] += len(getattr(found, kind))
                for what in getattr(found, kind):
                    tqdm.write(f"round {number}, {kind}: {what}")
            jobs.update(found.jobs)
    print(f"rounds {args.rounds}, durability {args.durability}, processes killed {args.rounds * 6}")
    for kind in (
        "acknowledged",
        "checked",
        "reads",
        "lost",
        "torn",
        "orphans",
        "unhealthy",
        "failed",
    ):
        print(f"{kind:>12} {totals[kind]}")
    print("work done:", dict(jobs))


if __name__ == "__main__":
    main()
