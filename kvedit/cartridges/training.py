"""train: a start and samples in, a trained cartridge out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvedit.cartridges.distractors import Distractors
from kvedit.cartridges.identity import run_identity, trained_lineage
from kvedit.cartridges.packed_model import PackedModel, open_packed
from kvedit.cartridges.plan import TrainPlan
from kvedit.cartridges.prefix import Prefix
from kvedit.cartridges.sample import Sample
from kvedit.cartridges.trainable import TrainableMemory
from kvedit.cartridges.trainer import OnEval, Surroundings, Trainer
from kvedit.cartridges.workers import Workers
from kvedit.errors import IncompatibleModel, InvalidArgument, UnsupportedModel
from kvedit.memory import KVMemory
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.models.route import plain_name
from kvedit.runtime.gate import admit
from kvedit.tracking import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["train"]


def train(
    model: PreTrainedModel,
    start: KVMemory,
    samples: Iterable[Sample],
    plan: TrainPlan | Mapping[str, Any] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    held_out: Iterable[Sample] = (),
    distractors: Sequence[KVMemory] = (),
    teacher: KVMemory | None = None,
    folder: Path | str | None = None,
    tracker: Tracker | None = None,
    on_eval: OnEval | None = None,
    progress: bool = False,
    strict: bool = True,
) -> KVMemory:
    """Returns the cartridge that a start memory becomes by training on samples.

    The model stays frozen; only keys and values (and bias, if the plan says so) of the start's
    slots are trained. The start may be any memory: from :mod:`kvedit.cartridges.initial`, from an
    editor, or a cartridge from a store, which goes on being trained.

    With a folder, checkpoints are written there, and a run that was killed goes on from the newest
    one; on the CPU it ends at the same bits. A run that has ended gives its result again.

    Launched by ``accelerate launch`` or ``torchrun``, all processes train one cartridge and each
    returns it.

    Args:
        model: the model that made the start, in eval mode.
        start: where to start from; it never changes.
        samples: what follows the memory, and what a teacher says there. A
            :class:`~kvedit.cartridges.study.SampleSet` says which model made it.
        plan: how to train; a mapping as a config file holds it; None for the defaults.
        tokenizer: the model's tokenizer, for the compatibility gate.
        held_out: samples to evaluate on; they decide on early stopping and on the best step.
        distractors: other memories of the model, of which some stand beside the target in some
            steps.
        teacher: memory whose attention outputs are matched, for an objective with ``attention``.
        folder: folder for checkpoints, of this run alone.
        tracker: takes loss, KL, rates, speed and drift.
        on_eval: called at every evaluation, for example to let the model answer questions.
        progress: whether to show a progress bar.
        strict: whether the compatibility gate counts fingerprints.

    Raises:
        InvalidArgument: if there are no samples, nothing is left to train, the folder holds
            another run, or the loss is no number any more.
        IncompatibleModel: if a memory, samples, or the folder's checkpoints are of another model.
        ContextTooLong: if a sample does not fit behind the memory.
        UnsupportedModel: if the model has a mechanism that is not understood, or is sharded.
    """
    found = TrainPlan() if plan is None else TrainPlan.of(plan)
    sets = (samples, held_out)
    given, kept = list(samples), list(held_out)
    if not given:
        raise InvalidArgument("there are no samples to train on")
    if (teacher is None) == (found.objective.attention > 0):
        raise InvalidArgument(
            f"the objective weighs attention outputs by {found.objective.attention} and teacher is "
            f"{'missing' if teacher is None else 'given'}: give both or neither"
        )
    _refuse_no_backward(model)
    workers = Workers(model.device)
    extra = [*distractors, *([] if teacher is None else [teacher])]
    with open_packed(model, tokenizer, found.recompute) as base:
        for memory in (start, *extra):
            admit(memory, base.spec, model.dtype, strict)
        if strict:
            _check_teacher(base, sets)
        _check_vocabulary(base, [*given, *kept])
        identity = run_identity(base.spec, start, given, found, kept, distractors, teacher)
        workers.agree(digest_bytes(canonical_json(identity)))
        student = _student(start, found, model.device)
        trainer = Trainer(
            base, student, given, kept,
            Distractors(distractors, start, found, model.device),
            None if teacher is None else Prefix.of(teacher, model.device),
            found, workers, identity,
            Surroundings(None if folder is None else Path(folder), tracker, on_eval, progress),
        )  # fmt: skip
        trainer.run()
    lineage = trained_lineage(identity, [start, *extra], found, trainer.taken)
    return dataclasses.replace(student.to_memory(), lineage=lineage)


def _refuse_no_backward(model: PreTrainedModel) -> None:
    if plain_name(model) == "flex_attention" and model.device.type == "cpu":
        raise UnsupportedModel(
            "torch's flex_attention has no backward on the CPU: "
            "model.set_attn_implementation('sdpa') first"
        )


def _student(start: KVMemory, plan: TrainPlan, device: torch.device) -> TrainableMemory:
    master = torch.float32 if plan.masters == "float32" else None
    return TrainableMemory(start, plan.freeze, master, device)


def _check_teacher(base: PackedModel, sets: Iterable[Iterable[Sample]]) -> None:
    """Raises if a folder of samples says that another model made them."""
    live = dataclasses.asdict(base.spec.fingerprint)
    for each in sets:
        made = getattr(each, "facts", {}).get("model")
        if not isinstance(made, Mapping):
            continue
        different = [
            f"{name}: samples {str(made[name])[:18] or 'none'}, model {value[:18] or 'none'}"
            for name, value in live.items()
            # An unknown tokenizer fits all, as for memories.
            if made.get(name, value) != value and (name != "tokenizer" or (made[name] and value))
        ]
        if different:
            raise IncompatibleModel(
                f"the samples in {getattr(each, 'folder', 'memory')} were made with another model "
                f"than {base.spec.name}: {'; '.join(different)}. Make samples with this model; "
                "strict=False takes them as another teacher's"
            )


def _check_vocabulary(base: PackedModel, samples: Sequence[Sample]) -> None:
    highest = max(int(max(s.tokens.max(), s.top_ids.max())) for s in samples)
    if highest >= base.spec.vocabulary:
        raise InvalidArgument(
            f"a sample names token {highest}, {base.spec.name} has {base.spec.vocabulary}: the "
            "samples were made with another tokenizer"
        )
