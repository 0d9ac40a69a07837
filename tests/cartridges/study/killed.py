"""A study that is killed again and again, in a fresh interpreter; prints what it found as JSON.

Each child goes on where the last one was killed, and gets one step further: steps are the points
around every write to the disk, and every batch.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from kvedit.cartridges.study import SampleSet, shards, synthesize
from kvedit.cartridges.study.batches import Maker

from .conftest import corpus_of_lamps, small, tiny


def run(folder):
    model, tokenizer = tiny()
    settings = small(per_chunk=3)
    return synthesize(
        model, tokenizer, corpus_of_lamps(), folder, settings, 13, 1, batch_size=4, shard_size=3
    )


def deadly(step):
    """Makes this process die at its ``step``-th dangerous moment."""
    left = [step]

    def die():
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(place, name):
        before = getattr(place, name)

        def call(*args, **kwargs):
            die()
            found = before(*args, **kwargs)
            die()
            return found

        setattr(place, name, call)

    around(shards.os, "fsync")
    around(shards.Path, "replace")
    around(Maker, "make")


def child(folder, step):
    """Returns how a child ended that dies at a step, or by a random moment for None."""
    process = os.fork()
    if process == 0:
        if step is not None:
            deadly(step)
        run(folder)
        os._exit(0)
    if step is None:
        time.sleep(random.uniform(0.02, 0.3))
        os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def main(place):
    torch.set_num_threads(1)
    plain = run(place / "plain")
    by_step, by_time, kills = place / "steps", place / "times", 0
    while child(by_step, kills % 12 + 1) != 0:
        kills += 1
    for seed in range(6):
        random.seed(seed)
        child(by_time, None)
    run(by_time)
    sets = [plain, SampleSet(by_step), SampleSet(by_time)]
    print(
        json.dumps(
            {
                "kills": kills,
                "digests": [found.digest for found in sets],
                "attempts": [found.column("attempt") for found in sets],
                "left": [p.name for f in (by_step, by_time) for p in f.glob(".tmp-*")],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
