"""Trainer: steps over packed samples, from a start or a checkpoint to the end of the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvedit.cartridges.checkpoint import Checkpoint, check_same_run, latest, write
from kvedit.cartridges.distractors import Distractors
from kvedit.cartridges.evaluation import HeldOut, Record
from kvedit.cartridges.order import step_rows
from kvedit.cartridges.packed_model import PackedModel
from kvedit.cartridges.packing import Batch, Pack, collate, read_length
from kvedit.cartridges.plan import TrainPlan
from kvedit.cartridges.prefix import Prefix
from kvedit.cartridges.sample import Sample
from kvedit.cartridges.saving import gather, load_parameters, restore
from kvedit.cartridges.schedule import rate
from kvedit.cartridges.trainable import TrainableMemory
from kvedit.cartridges.workers import Workers
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.tracking import Tracker

__all__ = ["OnEval", "Surroundings", "Trainer"]

OnEval = Callable[[int, KVMemory], Mapping[str, float] | None]
"""Called on the main process with the step and the memory at every evaluation; what it returns is
logged under ``eval/``."""


@dataclass(frozen=True)
class Surroundings:
    """What a run needs besides its plan, and what its result does not depend on.

    Args:
        folder: where checkpoints go, or None for none.
        tracker: what takes metrics, or None.
        on_eval: called at every evaluation, or None.
        progress: whether to show a progress bar.
    """

    folder: Path | None = None
    tracker: Tracker | None = None
    on_eval: OnEval | None = None
    progress: bool = False


class Trainer:
    """One run. :func:`~kvedit.cartridges.training.train` is the public way.

    Randomness is a function of seed and step, and models in eval mode draw nothing, so a run that
    goes on from a checkpoint needs no random state to give the same bits.

    Args:
        base: the open model.
        student: the parameters.
        samples: what to train on.
        held_out: what to evaluate on; may be empty.
        others: distractors.
        teacher: memory whose attention outputs are matched, on the model's device, or None.
        plan: the plan.
        workers: processes that take part.
        identity: of the run.
        around: checkpoints, tracker, hook.

    Attributes:
        step: steps made.
        record: what evaluations said.
    """

    def __init__(
        self,
        base: PackedModel,
        student: TrainableMemory,
        samples: Sequence[Sample],
        held_out: Sequence[Sample],
        others: Distractors,
        teacher: Prefix | None,
        plan: TrainPlan,
        workers: Workers,
        identity: dict[str, Any],
        around: Surroundings,
    ) -> None:
        """Packs all steps and makes the optimizer; checks that every sample fits."""
        self.base, self.student, self.samples = base, student, samples
        self.others, self.teacher = others, teacher
        self.plan, self.workers, self.identity, self.around = plan, workers, identity, around
        self.steps = step_rows(samples, plan)
        self.held_out = HeldOut(held_out, plan, workers) if held_out else None
        longest = max(map(read_length, (*samples, *held_out)))
        base.check_length(student.prefix().next_position + others.reach, longest)
        if teacher is not None:
            base.check_length(teacher.next_position, longest)
        self.named = dict(student.named_parameters())
        self.optimizer = torch.optim.Adam(
            list(self.named.values()), lr=plan.lr, betas=plan.betas, eps=plan.epsilon
        )
        self.step = self._saved = 0
        self.record = Record()

    def run(self) -> None:
        """Trains to the end of the plan, or until patience runs out.

        Afterwards the student holds the parameters of the best evaluation, if the plan says so.

        Raises:
            InvalidArgument: if the loss is no number any more.
        """
        self._resume()
        if self.step == 0:
            self._evaluate()
        with self._bar() as bar:
            while self.step < len(self.steps) and not self.record.stopped:
                self._advance(bar)
                due = _due(self.plan.checkpoint_every, self.step)
                if due and not self._last():
                    self._save()
        self._save()
        if self.record.tensors and self.plan.best:
            load_parameters(self.named, self.record.tensors)

    @property
    def taken(self) -> int:
        """After how many steps the student's parameters were what they are."""
        return self.record.step if self.record.tensors and self.plan.best else self.step

    def _last(self) -> bool:
        return self.step == len(self.steps) or self.record.stopped

    def _advance(self, bar: Any) -> None:
        began = time.perf_counter()
        metrics = self._make_step(self.steps[self.step])
        self.step += 1
        seconds = time.perf_counter() - began
        for name in ("supervised", "read"):
            metrics[f"{name}_tokens_per_second"] = metrics.pop(f"{name}_tokens") / seconds
        bar.set_postfix(kl=f"{metrics['train/kl']:.4f}", refresh=False)
        bar.update()
        if _due(self.plan.drift_every, self.step) or self.step == len(self.steps):
            metrics |= self._drift()
        self._log(metrics)
        if _due(self.plan.eval_every, self.step) or self.step == len(self.steps):
            self._evaluate()

    def _make_step(self, packs: tuple[Pack, ...]) -> dict[str, float]:
        """Makes one optimizer step and returns its metrics."""
        rows = [[self.samples[number] for number in row] for row in packs]
        everyone = [sample for row in rows for sample in row]
        supervised = sum(len(sample) - sample.start for sample in everyone)
        sums = torch.zeros(4, dtype=torch.float64)
        mine = rows[self.workers.index :: self.workers.count]
        for start in range(0, len(mine), self.plan.rows):
            batch = collate(mine[start : start + self.plan.rows]).to(self.workers.device)
            sums += self._backward(batch, supervised)
        # In float32, which every device and backend can sum.
        means = self.workers.sum(sums.to(self.workers.device, torch.float32)) / supervised
        loss, kl, nll, attention = means.tolist()
        norm, lr = self._update(loss)
        metrics = {"train/loss": loss, "train/kl": kl, "train/nll": nll, "train/lr": lr}
        if self.plan.objective.attention:
            metrics["train/attention"] = attention
        metrics["train/gradient_norm"] = norm
        metrics["supervised_tokens"] = supervised
        metrics["read_tokens"] = sum(map(read_length, everyone))
        return metrics

    def _backward(self, batch: Batch, supervised: int) -> torch.Tensor:
        """Adds a pass's share of the gradient of the mean over all of the step's tokens."""
        with self._autocast():
            target = self.student.prefix()
            prefix = self.others.beside(target, self.step, self.base.spec)
            found = self.plan.objective.losses(self.base, prefix, batch, self.teacher)
            mean: torch.Tensor = found.total / supervised
        torch.autograd.backward(mean)
        parts = (found.total.detach(), found.kl, found.nll, found.attention)
        return torch.stack(parts).double().cpu()

    def _update(self, loss: float) -> tuple[float, float]:
        """Sums gradients over processes and steps; returns the gradient's norm and the rate."""
        parameters = list(self.named.values())
        self.workers.sum_gradients(parameters)
        limit = math.inf if self.plan.clip is None else self.plan.clip
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InvalidArgument(
                f"loss {loss}, gradient {norm} in step {self.step + 1}: try a lower lr than "
                f"{self.plan.lr}, clip, or warm-up; checkpoints from before are kept"
            )
        plan = self.plan
        # Before the step: set after it, the first step would be made at the peak.
        lr = rate(plan.schedule, self.step + 1, len(self.steps), plan.lr, plan.warmup, plan.final)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, lr

    def _evaluate(self) -> None:
        metrics: dict[str, float] = {}
        if self.held_out is not None:
            with self._autocast(), torch.no_grad():
                prefix = self.student.prefix()
                found = self.held_out.losses(self.base, prefix, self.teacher)
            metrics = {f"eval/{name}": value for name, value in found.items()}
            self.record.note(found["loss"], self.step, self.plan.patience, self._copy)
        if self.around.on_eval is not None and self.workers.main:
            said = self.around.on_eval(self.step, self.student.to_memory()) or {}
            metrics |= {f"eval/{name}": float(value) for name, value in said.items()}
        self.workers.wait()
        self._log(metrics)

    def _drift(self) -> dict[str, float]:
        metrics = {}
        for layer, moved in self.student.drift().items():
            metrics[f"drift/keys/layer_{layer:02d}"] = moved.keys
            metrics[f"drift/values/layer_{layer:02d}"] = moved.values
            if not self.plan.freeze.bias:
                metrics[f"drift/bias/layer_{layer:02d}"] = moved.bias
        return metrics

    def _log(self, metrics: Mapping[str, float]) -> None:
        if metrics and self.around.tracker is not None and self.workers.main:
            self.around.tracker.log(self.step, metrics)

    def _autocast(self) -> Any:
        if self.plan.precision == "model":
            return nullcontext()
        return torch.autocast(self.workers.device.type, torch.bfloat16)

    def _bar(self) -> Any:
        from tqdm.auto import tqdm

        hidden = not (self.around.progress and self.workers.main)
        return tqdm(
            total=len(self.steps), initial=self.step, desc="train", unit="step", disable=hidden
        )

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.named.items()}

    def _save(self) -> None:
        if self.step == self._saved:
            return
        if self.around.folder is not None and self.workers.main:
            tensors = gather(self.named, self.optimizer, self.record.tensors)
            made = Checkpoint(self.step, self.identity, tensors, self.record.to_json())
            write(self.around.folder, made, self.plan.keep)
        self._saved = self.step
        self.workers.wait()

    def _resume(self) -> None:
        found = None if self.around.folder is None else latest(self.around.folder)
        if found is None or self.around.folder is None:
            return
        check_same_run(found.identity, self.identity, self.around.folder)
        best = restore(found.tensors, self.named, self.optimizer)
        self.record = Record(**found.progress, tensors=best)
        self.step = self._saved = found.step


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
