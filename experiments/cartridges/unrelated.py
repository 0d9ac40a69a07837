"""What do cartridges do to questions that have nothing to do with their document?

    python experiments/cartridges/unrelated.py FOLDER

Run compose.py in the same folder first: its trained cartridges are taken from there. Two sides are
measured: how far answers are from those over the full document, and from those over nothing. A
document in the prompt moves unrelated answers, too: its row is the yardstick.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import torch
from compose import RATIO, START, Trio  # beside this file
from material import NAMES
from starts import STARTS

from kvedit.evals.recall import drift

QUESTIONS = (
    "What is the capital of Italy?",
    "How many legs does a spider have?",
    "Write one sentence about the sea.",
    "What is seven times eight?",
    "Who wrote Romeo and Juliet?",
    "Name three fruits.",
    "What does a thermometer measure?",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "What is the opposite of cold?",
    "Which planet is closest to the sun?",
    "Give me a title for a story about a lost dog.",
)


def main() -> None:
    """Prints one line per kind of memory: means over documents."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trio = Trio(options.folder, options.steps, 0)
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    for name in NAMES:
        text = trio.texts[name]
        memories = {
            "first-p": STARTS["first-p"](text, RATIO, 0),
            "KVZip": STARTS["KVZip"](text, RATIO, 0),
            "matched": trio.start(name),
            "trained alone": trio.trained(name, False),
            "trained with distractors": trio.trained(name, True),
        }
        found = drift(text.model, text.tokenizer, memories, QUESTIONS, full=text.full,
                      max_new_tokens=16, path=options.folder / "unrelated" / name)  # fmt: skip
        for kind in ("full", "nothing", *memories):
            sides = [
                (found.kl(kind, since).value, found.flipped(kind, since).value)
                for since in ("full", "nothing")
            ]
            rows.setdefault(kind, []).append((*sides[0], *sides[1]))
    print(f"{len(NAMES)} documents x {len(QUESTIONS)} questions; matched is {START}")
    print("| memory | KL from full | answers that differ | KL from nothing | answers that differ |"
          "\n|---|---:|---:|---:|---:|")  # fmt: skip
    for kind, each in rows.items():
        means = [fmean(column) for column in zip(*each, strict=True)]
        print(f"| {kind} | {means[0]:.3f} | {means[1]:.0%} | {means[2]:.3f} | {means[3]:.0%} |")


if __name__ == "__main__":
    main()
