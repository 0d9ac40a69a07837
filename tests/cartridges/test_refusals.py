"""Bad input to cartridges: one error each, that says what was expected, found, and what to do."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

import kvedit as kv
from kvedit.cartridges import Freeze, Objective, TrainPlan, compose, initial, train
from kvedit.cartridges.study import (
    Chunking,
    Corpus,
    Decoding,
    SampleSet,
    StudySettings,
    context_of,
    samples_from,
    save_samples,
    synthesize,
)
from kvedit.editors import build
from kvedit.errors import ContextTooLong, IncompatibleModel, InvalidArgument
from kvedit.models.tiny import tiny_model
from kvedit.runtime import ModelReader

SHORT = "Refunds are possible within 60 days."
FILLER = "The thing in the box is the answer. "


def said(error: type[Exception], *parts: str):
    """Expects an error whose message has all parts, in their order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


@pytest.fixture(scope="module")
def small():
    """A model with room for few tokens, its limit, and a text that goes past it."""
    model, tokenizer = tiny_model("gpt2")
    limit = 1024
    assert model.config.n_positions == limit
    return model, tokenizer, limit, FILLER * (limit // 8)


@pytest.fixture
def sample_folder(subject, sample_of, tmp_path):
    """A set of samples that says that tiny llama made it."""
    spec = subject("llama").memory.model
    folder = tmp_path / "samples"
    made = [replace(sample_of(number), question=f"What is {number}?") for number in range(4)]
    return save_samples(folder, made, {"model": spec.identity()["fingerprint"]})


@pytest.mark.parametrize("start", ["first_tokens", "sampled_chunks"])
def test_more_slots_than_the_context_has_tokens(subject, start):
    model, tokenizer = subject().model, subject().tokenizer
    with said(InvalidArgument, "9000 slots were asked for", "corpus has", "tokens", "ask for few"):
        getattr(initial, start)(model, tokenizer, SHORT, 9000)


def test_more_slots_than_the_memory_has(subject):
    memory = subject().memory
    with said(InvalidArgument, "9000 slots were asked", f"has {memory.slots} tokens", "ask for"):
        initial.first_tokens(subject().model, None, memory, 9000)
    reader = ModelReader(subject().model, subject().tokenizer)
    for editor in ("truncate", "snap_kv", "attention_matching"):
        with said(InvalidArgument, "a budget of 9000 slots", f"has {memory.slots}", "or fewer"):
            build(editor, budget=9000)(memory, reader=reader)


def test_more_slots_than_the_model_has_positions(small):
    model, tokenizer, limit, _ = small
    with said(ContextTooLong, f"{limit + 1} slots", f"{limit} positions", "ask for fewer"):
        initial.random_vectors(model, tokenizer, limit + 1)


@pytest.mark.parametrize("slots", [0, -3, 1, 0.0, -0.5, 1.5, float("nan"), True, "12", None])
def test_budgets_that_are_none(subject, slots):
    found = repr(slots)
    with said(InvalidArgument, "budget: expected a ratio in (0, 1]", "from 2", f"found {found}"):
        initial.first_tokens(subject().model, subject().tokenizer, SHORT, slots)
    with said(InvalidArgument, "budget: expected a ratio in (0, 1]", f"found {found}"):
        build("attention_matching", budget=slots)


@pytest.mark.parametrize("start", ["random_vectors", "summary"])
def test_counts_below_two(subject, start):
    given = (SHORT,) if start == "summary" else ()
    with said(InvalidArgument, "slots: expected a whole number from 2, found 0"):
        getattr(initial, start)(subject().model, subject().tokenizer, *given, 0)


def test_nothing_to_read(subject, tmp_path):
    model, tokenizer = subject().model, subject().tokenizer
    with said(InvalidArgument, "the corpus is empty", "at least one document"):
        Corpus.of()
    with said(InvalidArgument, "'document 1' has no text"):
        Corpus.of(" \n")
    with said(InvalidArgument, str(tmp_path), "holds no .txt, .md, .json file"):
        Corpus.read(tmp_path)
    with said(InvalidArgument, "the corpus is empty"):
        Corpus.read()
    for empty in ("", []):
        with said(InvalidArgument, "the context is empty", "expected a text"):
            kv.capture(model, tokenizer, empty)
        with said(InvalidArgument, "the context is empty", "expected a text"):
            initial.first_tokens(model, tokenizer, empty, 8)


def test_a_corpus_beyond_the_context(small, tmp_path):
    model, tokenizer, limit, text = small
    tokens = len(tokenizer(text)["input_ids"])
    assert tokens > limit
    for read in (
        lambda: kv.capture(model, tokenizer, text),
        lambda: initial.summary(model, tokenizer, text, 8),
        lambda: initial.edited(model, tokenizer, text, build("truncate", budget=8)),
        lambda: initial.first_tokens(model, tokenizer, text, limit + 1),
        lambda: initial.sampled_chunks(model, tokenizer, text, limit + 64),
    ):
        with said(ContextTooLong, "tokens", f"has {limit} positions", "shorter context"):
            read()
    # Chunks from all over it, its beginning, and its study fit: only what is read must.
    assert initial.sampled_chunks(model, tokenizer, text, 33, chunk=8).slots == 33
    assert initial.first_tokens(model, tokenizer, text, 16).slots == 16


def test_a_chunk_beyond_the_context_leaves_no_folder(small, tmp_path):
    model, tokenizer, limit, text = small
    corpus, folder = Corpus.of(text), tmp_path / "samples"
    settings = StudySettings(chunking=Chunking(min_tokens=64, max_tokens=limit), chat=False)
    with said(ContextTooLong, f"chunks of {limit} tokens", "are left; lower max_tokens", "clip"):
        synthesize(model, tokenizer, corpus, folder, settings, n=1)
    assert not folder.exists()
    short = Decoding(4)
    clipped = StudySettings(
        chunking=Chunking(min_tokens=8, max_tokens=limit, overlong="clip"), chat=False,
        question=short, answer=Decoding(limit),
    )  # fmt: skip
    with said(ContextTooLong, "0 tokens are left", "tokens of questions and answers"):
        synthesize(model, tokenizer, corpus, folder, clipped, n=1)
    assert not folder.exists()


def test_a_chat_without_a_template(subject, tmp_path):
    model, tokenizer = tiny_model("llama")
    tokenizer.chat_template = None
    memory = kv.capture(model, tokenizer, SHORT)
    settings, folder = StudySettings(chat=True), tmp_path / "samples"
    with said(InvalidArgument, "has no chat template", "leave out chat=True"):
        synthesize(model, tokenizer, Corpus.of(SHORT), folder, settings, n=1)
    assert not folder.exists()
    with said(InvalidArgument, "no chat template"):
        context_of(tokenizer, "t", SHORT, chat=True)
    with said(InvalidArgument, "no chat template"):
        samples_from(model, tokenizer, [("Why?", "So.")], memory, chat=True)
    with said(InvalidArgument, "no chat template"):
        kv.capture(model, tokenizer, [{"role": "user", "content": SHORT}])
    # Without being asked for, a chat is not needed: the context is plain text.
    assert isinstance(context_of(tokenizer, "t", SHORT), str)


def test_samples_of_another_model(subject, sample_folder, tmp_path):
    other = subject("llama", seed=1)
    with said(
        IncompatibleModel, str(sample_folder.folder), "another model than", "weights: samples",
        "Make samples with this model; strict=False",
    ):  # fmt: skip
        train(other.model, other.memory, sample_folder, {"steps": 1}, folder=tmp_path / "c")
    first, held = sample_folder.split(0.3)
    with said(IncompatibleModel, "another model than"):
        train(other.model, other.memory, list(first), {"steps": 1}, held_out=held)
    assert not (tmp_path / "c").exists()
    made = train(other.model, other.memory, sample_folder, {"steps": 1}, strict=False)
    assert made.slots == other.memory.slots
    own = subject("llama")
    assert train(own.model, own.memory, SampleSet(sample_folder.folder), {"steps": 1}).slots


def test_a_cartridge_of_another_model(subject, samples):
    own, other = subject("llama"), subject("llama", seed=1)
    for given in ({"distractors": [other.memory]}, {"teacher": other.memory}):
        plan = {"steps": 1, "distractors": float("distractors" in given)}
        plan["objective"] = {"attention": float("teacher" in given)}
        with said(IncompatibleModel, "does not fit", "weights fingerprint: memory", "model"):
            train(own.model, own.memory, samples, plan, **given)
    with said(IncompatibleModel, "does not fit", "weights fingerprint"):
        train(own.model, other.memory, samples, {"steps": 1})
    with said(IncompatibleModel, "does not fit", "layers: memory"):
        train(own.model, subject("gemma3").memory, samples, {"steps": 1})


def test_a_checkpoint_of_another_model(subject, samples, tmp_path):
    own, other = subject("llama"), subject("llama", seed=1)
    plan = {"steps": 2, "checkpoint_every": 1}
    train(own.model, own.memory, samples, plan, folder=tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with said(
        IncompatibleModel, str(tmp_path), "another model: weights: checkpoint", "model",
        "Choose another folder",
    ):  # fmt: skip
        train(other.model, other.memory, samples, plan, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("family", "what"),
    [("gpt2", "layer 0 kv_heads: 2, 4"), ("qwen3", "layer 0 key_dim: 16, 32"),
     ("gemma3", "layers: 3, ")],
)  # fmt: skip
def test_heads_that_can_not_stand_together(subject, family, what):
    own, other = subject("llama").memory, subject(family).memory
    for rotate in (True, False):
        with said(IncompatibleModel, "can't stand together", what, "that one model made"):
            compose([own, other], rotate=rotate)
    with said(IncompatibleModel, "can't stand together: weights: ", "one model made"):
        compose([own, subject("llama", seed=1).memory])


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"lr": float("nan")}, ("lr: expected a finite number above 0, found nan",)),
        ({"lr": float("inf")}, ("lr: expected a finite number above 0, found inf",)),
        ({"lr": "fast"}, ("lr: expected a finite number above 0, found 'fast'",)),
        ({"lr": 0.0}, ("lr: expected a finite number above 0, found 0.0",)),
        ({"clip": float("nan")}, ("clip: expected a number above 0, or None, found nan",)),
        ({"clip": "no"}, ("clip: expected a number above 0, or None, found 'no'",)),
        ({"final": None}, ("final: expected a number from 0 to 1, found None",)),
        ({"betas": [0.9, "b"]}, ("betas: expected two numbers from 0 below 1", "'b'")),
        ({"schedule": "step"}, ("schedule: expected constant, linear, cosine, found 'step'",)),
        ({"steps": 0}, ("steps: expected a whole number from 1, found 0",)),
        ({"objective": {"distill": float("nan")}}, ("weights from 0", "nan")),
        ({"objective": {"distill": "all"}}, ("weights from 0", "'all'")),
        ({"objective": "attention"}, ("objective: expected keys and values, found 'attention'",)),
        ({"freeze": ["keys"]}, ("freeze: expected keys and values, found ['keys']",)),
    ],
    ids=str,
)
def test_plans_with_bad_numbers(plan, words):
    with said(InvalidArgument, *words):
        TrainPlan.of(plan)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"objective": {"distil": 1.0}}, ("key of objective 'distil'", "Did you mean distill")),
        ({"objective": {"mse": 1.0}}, ("'mse'", "Known: attention, distill, next_token")),
        ({"freeze": {"sink": 1}}, ("key of freeze 'sink'", "Did you mean sinks")),
        ({"learning_rate": 1.0}, ("key of plan 'learning_rate'", "Known: best, betas")),
    ],
    ids=str,
)
def test_plans_with_unknown_names(plan, words):
    with said(InvalidArgument, "unknown", *words):
        TrainPlan.of(plan)


@pytest.mark.parametrize("kind", [Objective, Freeze])
def test_parts_of_plans_are_read_alike(kind):
    with said(InvalidArgument, f"unknown key of {kind.__name__.lower()} 'none'", "Known: "):
        kind.of({"none": 1})
    assert kind.of(kind()) == kind()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keys": "omq"}, ("keys", "omp", "'omq'")),
        ({"solver": "lasso"}, ("solver", "nnls", "'lasso'")),
        ({"score": "median"}, ("score", "rms", "'median'")),
        ({"queries": "self-study"}, ("queries", "self_study", "'self-study'")),
        ({"allocate": "even"}, ("allocate", "uniform", "'even'")),
        ({"ridge": "cv"}, ("ridge", "finite number from 0, or 'auto'", "'cv'")),
    ],
    ids=str,
)
def test_unknown_estimators(options, words):
    with said(InvalidArgument, *words):
        build("attention_matching", budget=0.5, **options)
