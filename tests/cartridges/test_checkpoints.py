"""Kill -9 and go on: the same bits. And what a folder must not be mistaken for."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal

import pytest
import torch

from kvedit.cartridges import TrainPlan, checkpoint, train
from kvedit.cartridges.checkpoint import Checkpoint, latest, write
from kvedit.errors import CorruptMemory, IncompatibleModel, InvalidArgument

PLAN = TrainPlan(
    steps=9, pack=30, packs=2, schedule="cosine", warmup=3, eval_every=2, checkpoint_every=2, keep=2
)


class Killer:
    """A tracker that kills its process, or raises, when a step is logged."""

    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def log(self, step, metrics):
        if step == self.step and "train/loss" in metrics:
            if self.error is not None:
                raise self.error
            os.kill(os.getpid(), signal.SIGKILL)


def run(found, samples, folder, plan=PLAN, **options):
    return train(
        found.model, found.memory, samples[2:], plan, held_out=samples[:2], folder=folder, **options
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("step", [5, 8])
def test_a_killed_run_goes_on_and_ends_at_the_same_bits(step, subject, samples, tmp_path, notes):
    found = subject()
    whole = run(found, samples, tmp_path / "whole")
    child = multiprocessing.get_context("fork").Process(
        target=run, args=(found, samples, tmp_path / "killed"), kwargs={"tracker": Killer(step)}
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    last = (step - 1) // 2 * 2
    assert names(tmp_path / "killed")[-1] == f"step-{last:08d}"
    again = run(found, samples, tmp_path / "killed", tracker=notes)
    steps = [step for step, metrics in notes.logged if "train/loss" in metrics]
    assert steps == list(range(last + 1, 10))
    assert again.digest == whole.digest
    assert again.lineage.head.id == whole.lineage.head.id
    one, two = (latest(tmp_path / name) for name in ("whole", "killed"))
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(tensor, two.tensors[name]) for name, tensor in one.tensors.items())
    assert one.progress == two.progress


def test_a_run_that_has_ended_gives_its_result_and_trains_no_more(
    subject, samples, tmp_path, notes
):
    found = subject()
    made = run(found, samples, tmp_path)
    kept = names(tmp_path)
    assert kept == ["step-00000008", "step-00000009"]
    again = run(found, samples, tmp_path, tracker=notes)
    assert (again.digest, notes.logged, names(tmp_path)) == (made.digest, [], kept)


def test_an_error_leaves_whole_checkpoints_and_nothing_else(subject, samples, tmp_path):
    found = subject()
    with pytest.raises(ZeroDivisionError):
        run(found, samples, tmp_path, tracker=Killer(5, ZeroDivisionError()))
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    assert latest(tmp_path).step == 4


def test_a_write_that_fails_or_is_cut_leaves_the_one_before(tmp_path, monkeypatch):
    made = Checkpoint(1, {"model": {}, "plan": {}}, {"a": torch.arange(3.0)})
    write(tmp_path, made, keep=2)

    def full(path, data):
        path.write_bytes(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_flushed", full)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path, dataclasses.replace(made, step=2), keep=2)
    assert latest(tmp_path).step == 1
    write(tmp_path, dataclasses.replace(made, step=3), keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]  # and the half one is swept
    assert torch.equal(latest(tmp_path).tensors["a"], torch.arange(3.0))


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used_without_it(
    file, subject, samples, tmp_path
):
    found = subject()
    whole = run(found, samples, tmp_path)
    place = tmp_path / "step-00000009" / file
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(bytes(data))
    with pytest.raises(CorruptMemory, match="step-00000009"):
        run(found, samples, tmp_path)
    for left in place.parent.iterdir():
        left.unlink()
    place.parent.rmdir()
    assert run(found, samples, tmp_path).digest == whole.digest


def test_another_model_s_checkpoints_are_refused(subject, samples, tmp_path):
    one, other = subject(), subject(seed=1)
    run(one, samples, tmp_path)
    before = names(tmp_path)
    with pytest.raises(IncompatibleModel, match="another model"):
        run(other, samples, tmp_path)
    assert names(tmp_path) == before


def test_another_plan_or_other_samples_are_refused_with_both_values(subject, samples, tmp_path):
    found = subject()
    run(found, samples, tmp_path)
    with pytest.raises(InvalidArgument, match=r"plan.lr: checkpoint 0.02, now 0.01"):
        run(found, samples, tmp_path, dataclasses.replace(PLAN, lr=1e-2))
    with pytest.raises(InvalidArgument, match="samples: checkpoint"):
        run(found, [*samples, samples[0]], tmp_path)
    run(found, samples, tmp_path, dataclasses.replace(PLAN, keep=5, rows=2, recompute=True))


def test_a_format_of_tomorrow_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", "kvedit.training.9")
    write(tmp_path, Checkpoint(1, {}, {"a": torch.zeros(1)}), keep=1)
    monkeypatch.undo()
    with pytest.raises(InvalidArgument, match=r"kvedit.training.9"):
        latest(tmp_path)


def test_a_checkpoint_is_safetensors_and_json(subject, samples, tmp_path):
    from safetensors.torch import load_file

    run(subject(), samples, tmp_path)
    place = tmp_path / "step-00000009"
    assert names(place) == ["state.json", "tensors.safetensors"]
    state = json.loads((place / "state.json").read_text())
    assert (state["format"], state["step"]) == ("kvedit.training.1", 9)
    kinds = {name.split(".")[0] for name in load_file(place / "tensors.safetensors")}
    assert kinds == {"parameter", "step", "exp_avg", "exp_avg_sq", "best"}
