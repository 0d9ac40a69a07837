"""Layer and strength: residual hooks in one layer, and values in the cache in windows of layers.

    python experiments/cache_steering/map.py FOLDER

Everything is drawn by a seed of its own, and what looks best there is only a candidate: second.py
asks it about questions that this map has not seen. Journals in FOLDER: a killed run goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from setup import INSTRUCTION, OPENS, Draw, in_cache, in_layers, on_from_offset  # beside this file

import kvedit as kv
from kvedit.evals.steering import Baselines, Sweep, sweep
from kvedit.steering import extract

SEED, QUESTIONS, BYSTANDERS = 200, 16, 8
LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 29)
RESIDUAL = (0.5, 1.0, 2.0, 4.0, 8.0)
WINDOWS = {"1-5": range(1, 6), "6-11": range(6, 12), "12-17": range(12, 18),
           "18-23": range(18, 24), "24-29": range(24, 30), "1-29": range(1, 30)}  # fmt: skip
VALUES = (2.0, 4.0, 6.0, 8.0, 12.0)


def maps(model: Any, tokenizer: Any, folder: Path) -> dict[str, Sweep]:
    """Returns both sweeps; answers what their journals lack."""
    draw = Draw(model, tokenizer, folder, SEED, QUESTIONS, BYSTANDERS)
    delta = extract(model, tokenizer, draw.contrast, sites=("keys", "values", "residual"),
                    folder=folder / f"read{SEED}")  # fmt: skip
    baselines = Baselines.of(in_cache, delta, 6.0, instruction=INSTRUCTION,
                             examples=draw.examples, seeds=(SEED,))  # fmt: skip

    def run(name: str, apply: Any, layers: Any, strengths: Any) -> Sweep:
        return sweep(draw.asker, draw.questions, apply, layers, strengths, baselines,
                     draw.bystanders, identity=delta.digest, markers=OPENS, progress=True,
                     path=folder / f"map-{name}.jsonl")  # fmt: skip

    return {
        "residual": run("residual", lambda i, c: on_from_offset(model, delta, "residual", [i])(c),
                        LAYERS, RESIDUAL),
        "values": run("values", lambda w, c: in_layers(delta, WINDOWS[w])(c),
                      tuple(WINDOWS), VALUES),
    }  # fmt: skip


def main() -> None:
    """Runs what is missing, prints tables and draws both maps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = kv.load("smollm2-135m")
    titles = {"residual": "residual, one layer, from the offset token on",
              "values": "values in the last prompt slot, windows of layers"}  # fmt: skip
    for name, found in maps(model, tokenizer, folder).items():
        print(f"{name}\n{found.report}\nbest with a KL of at most 0.5: {found.best(0.5)}")
        title = f"{titles[name]}; n = {QUESTIONS} questions"
        picture = kv.plots.strength_map(found, ("marked", "opening", "kl"), title=title)
        picture.savefig(Path(__file__).with_name(f"map-{name}.png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
