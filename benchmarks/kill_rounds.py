"""Kills writers and readers at random moments, many times, and counts what was lost.

python benchmarks/kill_rounds.py --rounds 200
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from kvedit.testing.killing import PROCESSES, kill_rounds

COUNTS = ("acknowledged", "checked", "reads")
WRONG = ("lost", "torn", "orphans", "unhealthy", "failed")


def main() -> None:
    """Runs the rounds and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--durability", choices=("full", "process", "none"), default="process")
    args = parser.parse_args()
    totals: Counter[str] = Counter()
    jobs: Counter[str] = Counter()
    killed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        seeds = range(args.seed, args.seed + args.rounds)
        rounds = kill_rounds(Path(folder), seeds, args.durability)
        for seed, found in zip(seeds, tqdm(rounds, total=len(seeds)), strict=True):
            totals.update({kind: getattr(found, kind) for kind in COUNTS})
            jobs += found.jobs
            killed += found.killed
            for kind in WRONG:
                totals[kind] += len(getattr(found, kind))
                for what in getattr(found, kind):
                    tqdm.write(f"seed {seed}, {kind}: {what}")
    print(f"rounds {args.rounds}, durability {args.durability}, kills {PROCESSES * args.rounds}")
    for kind in (*COUNTS, *WRONG):
        print(f"{kind:>18} {totals[kind]:6}")
    for title, counts in (("done", jobs), ("killed in", killed)):
        print(title)
        for what, count in sorted(counts.items()):
            print(f"{what:>18} {count:6}")


if __name__ == "__main__":
    main()
