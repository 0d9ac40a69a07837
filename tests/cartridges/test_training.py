"""train(): what it makes, from what it may go on, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import kvedit as kv
from kvedit.cartridges import (
    Freeze,
    Objective,
    Sample,
    TrainPlan,
    collate,
    compose,
    open_packed,
    sink_positions,
    train,
)
from kvedit.cartridges.prefix import Prefix
from kvedit.editors import Shift
from kvedit.errors import ContextTooLong, IncompatibleModel, InvalidArgument, UnsupportedModel
from kvedit.memory.lineage import Lineage

FEW = TrainPlan(steps=3, pack=40)


def content(memory):
    return dataclasses.replace(memory, lineage=Lineage()).digest


def taught(found, memory, questions):
    """Samples whose teacher is the model itself over ``memory``."""
    made = []
    for number, question in enumerate(questions):
        ids = torch.tensor(found.tokenizer(question, add_special_tokens=False)["input_ids"])
        with kv.attach(found.model, memory) as session:
            logits = session.forward(ids[None])[0].log_softmax(dim=1)
        start = len(ids) // 2
        top = logits[start - 1 : -1].topk(20)
        tail = torch.log1p(-top.values.exp().sum(dim=1).clamp_max(1 - 1e-6))
        made.append(
            Sample(
                str(number),
                "d",
                "question",
                question,
                "",
                ids,
                start,
                top.indices,
                top.values,
                tail,
            )
        )
    return made


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_a_short_memory_learns_to_answer_like_the_long_one(family, subject):
    found = subject(family)
    questions = ["How long is the refund window?", "What is in the box?", "You would not wait."]
    samples = taught(found, found.memory, questions)
    start = kv.cartridges.initial.first_tokens(found.model, found.tokenizer, found.memory, 12)
    losses = []
    for memory in (
        start,
        train(found.model, start, samples, TrainPlan(steps=30, pack=64, lr=5e-2)),
    ):
        with torch.no_grad(), open_packed(found.model) as base:
            batch = collate([samples])
            losses.append(float(Objective().losses(base, Prefix.of(memory), batch).kl))
    assert losses[1] < 0.5 * losses[0]


def test_the_result_names_what_made_it_and_keeps_what_it_stands_for(subject, samples, tmp_path):
    found = subject()
    weights = [weight.clone() for weight in found.model.parameters()]
    made = train(found.model, found.memory, samples, FEW, tokenizer=found.tokenizer)
    node = made.lineage.head
    assert (node.operation, node.name, node.reproducibility) == ("train", "train", "trained")
    assert node.inputs == (found.memory.lineage.head.id,)
    told = json.loads(node.parameters)
    assert told["plan"]["lr"] == 2e-2
    assert told["steps"] == 3
    assert told["start"] == found.memory.digest
    assert made.next_position == found.memory.next_position
    assert made.source == found.memory.source
    assert set(made.layers[0].source.tolist()[1:]) == {-1}
    found.memory.check_unmodified()
    assert all(map(torch.equal, weights, found.model.parameters()))
    store = kv.Store(tmp_path)
    store.put(made, "cartridge")
    assert store.get("cartridge").digest == made.digest
    assert "train" in store.get("cartridge").lineage.describe()
    with kv.attach(found.model, made) as session:
        assert session.forward(samples[0].tokens[None]).isfinite().all()


def test_equal_runs_give_equal_bits_and_another_seed_does_not(subject, samples):
    found = subject()
    made = [train(found.model, found.memory, samples, FEW) for _ in range(2)]
    assert made[0].digest == made[1].digest
    assert made[0].lineage.head.id == made[1].lineage.head.id
    other = train(found.model, found.memory, samples, dataclasses.replace(FEW, seed=1))
    assert other.digest != made[0].digest


def test_rows_are_accumulated_to_the_same_step(subject, samples, notes):
    found = subject(dtype=torch.float64)
    plan = TrainPlan(steps=3, pack=24, packs=4)
    made = [
        train(found.model, found.memory, samples, dataclasses.replace(plan, rows=rows))
        for rows in (1, 3, 4)
    ]
    for other in made[1:]:
        for a, b in zip(made[0].layers.values(), other.layers.values(), strict=True):
            assert torch.allclose(a.keys, b.keys, rtol=1e-5, atol=1e-6)
            assert torch.allclose(a.values, b.values, rtol=1e-5, atol=1e-6)


def test_the_tracker_hears_of_loss_speed_rate_and_drift(subject, samples, notes):
    found = subject()
    plan = TrainPlan(
        steps=4, pack=40, schedule="linear", warmup=2, lr=1e-2, eval_every=2, drift_every=2
    )
    asked = []

    def ask(step, memory):
        asked.append((step, content(memory)))
        return {"accuracy": 0.5}

    train(
        found.model, found.memory, samples[2:], plan, held_out=samples[:2], tracker=notes,
        on_eval=ask,
    )  # fmt: skip
    assert notes.series("train/lr") == pytest.approx([5e-3, 1e-2, 5e-3, 0.0])
    assert [step for step, _ in asked] == [0, 2, 4]
    assert asked[0][1] == content(
        dataclasses.replace(found.memory, layers=_untouched(found.memory).layers)
    )
    assert notes.series("eval/accuracy") == [0.5] * 3
    assert len(notes.series("eval/kl")) == len(notes.series("eval/nll")) == 3
    assert all(value > 0 for value in notes.series("train/supervised_tokens_per_second"))
    drift = notes.series("drift/keys/layer_00")
    assert 0 < drift[0] < drift[1]
    assert notes.series("drift/values/layer_02")[-1] > 0
    assert [step for step, _ in notes.logged] == sorted(step for step, _ in notes.logged)


def _untouched(memory):
    return kv.cartridges.TrainableMemory(memory).to_memory()


def test_the_reported_kl_is_that_of_the_memory_before_the_step(subject, samples, notes):
    found = subject()
    train(found.model, found.memory, samples, TrainPlan(steps=1, pack=400), tracker=notes)
    with torch.no_grad(), open_packed(found.model) as base:
        expected = Objective().losses(base, Prefix.of(found.memory), collate([samples]))
    tokens = sum(len(sample) - sample.start for sample in samples)
    assert notes.series("train/kl") == pytest.approx([float(expected.kl) / tokens], rel=1e-4)
    assert notes.series("train/nll") == pytest.approx([float(expected.nll) / tokens], rel=1e-4)


def test_patience_ends_training_and_the_best_evaluation_is_returned(subject, samples, notes):
    found = subject()
    plan = TrainPlan(steps=40, pack=40, lr=0.5, eval_every=1, patience=3)
    made = train(found.model, found.memory, samples[2:], plan, held_out=samples[:2], tracker=notes)
    seen = notes.series("eval/loss")
    best = min(range(len(seen)), key=seen.__getitem__)
    assert len(seen) == best + 4 < 40
    assert json.loads(made.lineage.head.parameters)["steps"] == best
    with torch.no_grad(), open_packed(found.model) as base:
        again = Objective().losses(base, Prefix.of(made), collate([samples[:2]]))
    tokens = sum(len(sample) - sample.start for sample in samples[:2])
    assert float(again.total) / tokens == pytest.approx(seen[best], rel=1e-4)


def test_a_stored_cartridge_goes_on_being_trained(subject, samples, tmp_path):
    found = subject()
    store = kv.Store(tmp_path)
    store.put(train(found.model, found.memory, samples, FEW), "first")
    again = train(found.model, store.get("first"), samples, FEW)
    assert [node.operation for node in again.lineage.nodes] == ["capture", "train", "train"]
    sink = [
        torch.equal(again.layers[i].keys[:, 0], found.memory.layers[i].keys[:, 0]) for i in (0, 2)
    ]
    assert sink == [True, True]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_attention_outputs_of_the_teacher_itself_are_no_loss(family, subject, samples, notes):
    found = subject(family)
    plan = TrainPlan(steps=1, pack=60, objective=Objective(distill=0.0, attention=1.0))
    train(found.model, found.memory, samples, plan, teacher=found.memory, tracker=notes)
    assert notes.series("train/loss")[0] < 1e-8
    short = kv.cartridges.initial.first_tokens(found.model, found.tokenizer, found.memory, 10)
    plan = dataclasses.replace(plan, steps=12)
    train(found.model, short, samples, plan, teacher=found.memory, tracker=notes)
    losses = notes.series("train/attention")[1:]
    assert 0 < losses[-1] < 0.9 * losses[0]


def test_distractors_stand_beside_the_target_and_stay_as_they_are(subject, samples):
    found = subject()
    others = [
        kv.capture(found.model, found.tokenizer, text) for text in ("Keep the receipt.", "No.")
    ]
    plan = dataclasses.replace(FEW, distractors=1.0, max_distractors=2)
    made = train(found.model, found.memory, samples, plan, distractors=others)
    alone = train(found.model, found.memory, samples, FEW)
    assert content(made) != content(alone)
    assert made.lineage.head.inputs[1:] == tuple(other.lineage.head.id for other in others)
    for other in others:
        other.check_unmodified()
    assert [layer.positions.tolist() for layer in made.layers.values()] == [
        layer.positions.tolist() for layer in found.memory.layers.values()
    ]


def test_a_composition_trains_with_every_part_s_sink_frozen(subject, samples):
    found = subject()
    parts = [found.memory, kv.capture(found.model, found.tokenizer, "Keep the receipt.")]
    whole = compose(parts)
    positions = sink_positions(parts)
    assert positions == (0, parts[0].next_position)
    plan = dataclasses.replace(FEW, freeze=Freeze(positions=positions))
    made = train(found.model, whole, samples, plan)
    same = (made.layers[0].keys == whole.layers[0].keys).all(dim=2).all(dim=0)
    assert same.nonzero().squeeze(1).tolist() == list(positions)


def test_half_precision_trains_on_wider_masters(subject, samples):
    found = subject(dtype=torch.bfloat16)
    made = train(found.model, found.memory, samples, FEW)
    assert made.dtype == torch.bfloat16
    assert content(made) != content(found.memory)
    mixed = subject()
    cast = train(mixed.model, mixed.memory, samples, dataclasses.replace(FEW, precision="bf16"))
    exact = train(mixed.model, mixed.memory, samples, FEW)
    moved = (cast.layers[0].values - exact.layers[0].values).abs().max()
    assert 0 < moved < 0.1


def test_bad_input_is_refused_before_anything_runs(subject, samples, sample_of, tmp_path):
    found = subject()
    model, memory = found.model, found.memory
    with pytest.raises(InvalidArgument, match="no samples"):
        train(model, memory, [], folder=tmp_path / "run")
    with pytest.raises(IncompatibleModel, match="does not fit"):
        train(subject("qwen3").model, memory, samples, folder=tmp_path / "run")
    with pytest.raises(IncompatibleModel, match="fingerprint"):
        train(subject(seed=1).model, memory, samples, folder=tmp_path / "run")
    strange = dataclasses.replace(samples[0], tokens=samples[0].tokens + 1000)
    with pytest.raises(InvalidArgument, match="another tokenizer"):
        train(model, memory, [strange], folder=tmp_path / "run")
    far = Shift(offset=16320)(memory)
    with pytest.raises(ContextTooLong, match="16384"):
        train(model, far, [sample_of(0, 40, 4)], folder=tmp_path / "run")
    with pytest.raises(InvalidArgument, match="teacher is missing"):
        train(model, memory, samples, {"objective": {"attention": 1.0}})
    with pytest.raises(InvalidArgument, match="teacher is given"):
        train(model, memory, samples, teacher=memory)
    with pytest.raises(InvalidArgument, match="give both or neither"):
        train(model, memory, samples, distractors=[memory])
    with pytest.raises(InvalidArgument, match="training mode"):
        train(_training(subject), memory, samples)
    assert not (tmp_path / "run").exists()
    learned = subject("gpt2")
    with pytest.raises(UnsupportedModel, match="learned"):
        train(
            learned.model, learned.memory, samples, {"distractors": 0.5},
            distractors=[learned.memory],
        )  # fmt: skip


def _training(subject):
    from kvedit.models.tiny import tiny_model

    return tiny_model("llama")[0].train()


def test_a_loss_that_is_no_number_ends_with_a_message(subject, samples):
    found = subject()
    broken = dataclasses.replace(samples[0], tail=torch.full_like(samples[0].tail, torch.nan))
    with pytest.raises(InvalidArgument, match="loss nan"):
        train(found.model, found.memory, [broken], FEW)
    assert all(weight.requires_grad for weight in found.model.parameters())
    assert not found.model.config._attn_implementation.startswith("kvedit")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"epochs": 1, "steps": 2}, "not both"),
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"schedule": "step"}, "schedule"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"precision": "fp16"}, "precision"),
        ({"patience": 2}, "eval_every"),
        ({"pack": 0}, "pack"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"objective": {"distill": 0.0}}, "weights"),
        ({"objective": {"distill": -1.0}}, "weights"),
    ],
)
def test_bad_plans_are_refused(plan, words):
    with pytest.raises(InvalidArgument, match=words):
        TrainPlan.of(plan)


def test_a_plan_reads_back_from_its_parameters():
    plan = TrainPlan(
        steps=3, freeze=Freeze(sinks=2, layers=(0,)), objective=Objective(next_token=0.5)
    )
    assert TrainPlan.of(json.loads(json.dumps(plan.parameters()))) == plan
    assert "checkpoint_every" not in plan.meaning()
