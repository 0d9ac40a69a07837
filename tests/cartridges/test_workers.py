"""Two processes train what one trains. They are forked, so they share the imports of this one."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket

import pytest
import torch

from kvedit.cartridges import TrainPlan, train
from kvedit.cartridges.checkpoint import latest
from kvedit.cartridges.workers import Workers
from kvedit.errors import UnsupportedModel

PLAN = TrainPlan(steps=6, pack=24, packs=3, eval_every=3, checkpoint_every=1, keep=9)


class Lines:
    """A tracker that writes a file."""

    def __init__(self, path):
        self.path = path

    def log(self, step, metrics):
        with self.path.open("a") as file:
            file.write(json.dumps([step, metrics]) + "\n")

    def read(self, name):
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [metrics[name] for _, metrics in lines if name in metrics]


def work(rank, port, found, samples, folder):
    from accelerate import PartialState

    PartialState._reset_state()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    given = samples[2:] if folder.name != "other" or rank == 0 else samples[3:]
    made = train(
        found.model, found.memory, given, PLAN, held_out=samples[:2],
        folder=folder, tracker=Lines(folder.with_suffix(".jsonl")),
    )  # fmt: skip
    folder.with_suffix(f".{rank}").write_text(made.digest)
    torch.distributed.destroy_process_group()


def start_two(found, samples, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    both = [
        context.Process(target=work, args=(rank, port, found, samples, folder)) for rank in (0, 1)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    return [process.exitcode for process in both]


def test_two_processes_make_the_steps_that_one_makes(subject, samples, tmp_path):
    found = subject()
    log = Lines(tmp_path / "one.jsonl")
    one = train(
        found.model, found.memory, samples[2:], PLAN, held_out=samples[:2],
        folder=tmp_path / "one", tracker=log,
    )  # fmt: skip
    assert start_two(found, samples, tmp_path / "two") == [0, 0]
    digests = [(tmp_path / f"two.{rank}").read_text() for rank in (0, 1)]
    assert digests[0] == digests[1]
    # Adam's first moment after one step is a tenth of the first gradient.
    firsts = [_checkpoint(tmp_path / name, 1) for name in ("one", "two")]
    for name, alone in firsts[0].items():
        if name.startswith("exp_avg."):
            together = firsts[1][name]
            assert (alone - together).norm() <= 1e-6 * alone.norm()
    both = Lines(tmp_path / "two.jsonl")
    for name in ("train/loss", "train/kl", "eval/loss"):
        assert both.read(name) == pytest.approx(log.read(name), rel=1e-4)
    assert len(both.read("train/loss")) == 6  # the main process alone logs
    assert one.lineage.head.id == _head(found, samples, tmp_path / "two")


def _checkpoint(folder, step):
    for path in sorted(folder.iterdir())[step:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    return latest(folder).tensors


def _head(found, samples, folder):
    again = train(found.model, found.memory, samples[2:], PLAN, held_out=samples[:2], folder=folder)
    return again.lineage.head.id


def test_processes_that_were_given_different_samples_are_refused(subject, samples, tmp_path):
    assert start_two(subject(), samples, tmp_path / "other") == [1, 1]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_sharding_launcher_is_refused_by_name(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UnsupportedModel, match="whole on every process"):
        Workers(torch.device("cpu"))
