"""synthesize: teacher, batches, resuming, kills, refusals, models of several families."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvedit as kv
from kvedit.cartridges.study import (
    Chunking,
    Corpus,
    Decoding,
    Document,
    SeedPrompt,
    StudySettings,
    context_of,
    corpus_context,
    question_turn,
    synthesize,
)
from kvedit.cartridges.study.reading import PLAIN_TASK
from kvedit.cartridges.study.synthesis import _log
from kvedit.errors import ContextTooLong, IncompatibleModel, InvalidArgument
from kvedit.models.tiny import tiny_model
from kvedit.runtime.text import encode
from kvedit.testing.tolerances import FP32_LOGITS

from .conftest import EVERYTHING, HOURS, LAMPS, corpus_of_lamps, small, tiny


@pytest.mark.parametrize("form", ["chat", "plain", "no template"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_teacher_is_the_model_that_has_the_chunk_in_its_prompt(tmp_path, corpus, family, form):
    model, tokenizer = tiny_model(family) if form == "no template" else tiny(family)
    if form == "no template":
        tokenizer.chat_template = None
    settings = small(chat=False if form == "plain" else None)
    made = synthesize(model, tokenizer, corpus, tmp_path, settings, 4, 1, batch_size=3)
    whole = encode(tokenizer, corpus_context(tokenizer, corpus, chat=form == "chat"))
    assert len(made) == 4
    for index, sample in enumerate(made):
        # What the student sees is a turn behind the whole corpus.
        turn = sample.tokens[: sample.start]
        assert torch.equal(turn, question_turn(tokenizer, whole, sample.question))
        # What the teacher saw is the chunk, the same turn, and the answer, in one plain pass.
        start, stop = map(int, made.row(index).chunk.split(":"))
        text = {d.title: d.text for d in corpus}[sample.document][start:stop]
        context = context_of(tokenizer, sample.document, text, chat=form == "chat")
        ids = torch.cat((encode(tokenizer, context).tokens, sample.tokens))
        answer = len(sample) - sample.start
        with torch.no_grad():
            exact = model(ids[None]).logits[0, -answer - 1 : -1].double().log_softmax(dim=-1)
        assert torch.equal(sample.tokens[sample.start :], exact.argmax(dim=-1))
        top = exact.topk(5)
        assert torch.equal(sample.top_ids, top.indices)
        assert (sample.top_logprobs - top.values).abs().max() <= FP32_LOGITS
        tail = torch.log1p(-top.values.exp().sum(dim=-1))
        assert (sample.tail - tail).abs().max() <= 10 * FP32_LOGITS
        said = tokenizer.decode(sample.tokens[sample.start :], skip_special_tokens=True)
        assert sample.answer == said.split("\n\n")[0].strip()


def test_questions_are_what_the_model_says_to_a_seed_prompt(tmp_path):
    model, tokenizer = tiny()
    settings = small(
        chunking=Chunking("cover", 5, 900),
        kinds=(),
        prompts=(SeedPrompt("own", "Ask me."),),
        question=Decoding(9),
        chat=False,
    )
    corpus = Corpus.of(Document("hours", HOURS))
    sample = synthesize(model, tokenizer, corpus, tmp_path, settings, 1)[0]
    memory = kv.capture(model, tokenizer, context_of(tokenizer, "hours", HOURS, chat=False))
    prompt = PLAIN_TASK.replace("{question}", "Ask me.")
    said = kv.generate(model, tokenizer, memory, prompt, max_new_tokens=9, do_sample=False)
    assert sample.question == said.split("\n")[0].strip()
    assert sample.kind == "own"


@pytest.mark.parametrize("chat", [True, False])
def test_a_question_opens_with_the_words_that_are_given(study, chat):
    settings = small(kinds=(), prompts=(SeedPrompt("own", "Ask.", "How many"),), chat=chat)
    made = study("set", 4, settings)
    assert all(q.startswith("How many") and len(q) > 9 for q in made.column("question"))
    tokenizer = tiny()[1]
    turn = made[0].tokens[: made[0].start].tolist()
    assert made[0].question in tokenizer.decode(turn)


def test_batches_and_files_do_not_change_what_is_made(study):
    sets = [
        study(f"{batch}", 7, batch_size=batch, shard_size=size, kept_chunks=kept)
        for batch, size, kept in [(8, 64, 16), (3, 1, 1), (1, 2, 2)]
    ]
    for other in sets[1:]:
        for a, b in zip(sets[0], other, strict=True):
            assert (a.key, a.question, a.answer) == (b.key, b.question, b.answer)
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.top_ids, b.top_ids)
            assert (a.top_logprobs - b.top_logprobs).abs().max() <= FP32_LOGITS
    assert study("8", 7).digest == sets[0].digest  # nothing was made again
    assert len({sample.question for sample in sets[0]}) == 7


def test_another_seed_asks_otherwise(study, corpus, tmp_path):
    model, tokenizer = tiny()
    other = synthesize(model, tokenizer, corpus, tmp_path / "other", small(), 6, 2)
    first = study("one")
    assert not {sample.key for sample in other} & {sample.key for sample in first}


def test_a_larger_n_goes_on_with_the_same_bits(study):
    short = study("grown", 3, batch_size=4)
    grown = study("grown", 10, batch_size=4)
    assert grown[:3].digest == short.digest
    assert grown.digest == study("whole", 10, batch_size=4).digest
    assert len(study("grown", 2)) == 2
    assert grown.attempts == 10


def test_questions_that_come_again_are_dropped_and_the_study_gives_up(study, caplog):
    # Greedy questions of one prompt about two chunks: two samples, and no third.
    settings = small(
        chunking=Chunking("cover", 5, 900), question=Decoding(4), kinds=(),
        prompts=(SeedPrompt("own", "Ask."),), tries=3, per_chunk=3,
    )  # fmt: skip
    with caplog.at_level("WARNING", _log.name):
        whole = study("whole", 4, settings, batch_size=5)
    assert "2 of 4 samples after 12 attempts" in caplog.text
    assert whole.column("attempt") == [0, 3] and whole.attempts == 12
    assert dict(whole.dropped) == {"question duplicate": 10}
    for n in (1, 2, 4):
        cut = study("cut", n, settings, batch_size=4, shard_size=2)
    assert cut.digest == whole.digest and cut.dropped == whole.dropped


def test_what_filters_drop_is_counted_and_the_same_after_resuming(study):
    filters = dataclasses.replace(EVERYTHING, min_question_chars=14, min_answer_tokens=8)
    settings = small(filters=filters, question=Decoding(6, 0.9))
    whole = study("whole", 5, settings, batch_size=4)
    assert whole.dropped["question short"] > 0
    assert sum(whole.dropped.values()) + len(whole) == whole.attempts
    assert all(len(sample.question) >= 14 for sample in whole)
    for n in (1, 3, 5):
        cut = study("cut", n, settings, batch_size=4, shard_size=3)
    assert cut.digest == whole.digest and cut.dropped == whole.dropped


def test_a_killed_study_resumes_without_losing_or_repeating_a_sample(tmp_path):
    command = [sys.executable, "-m", "tests.cartridges.study.killed", str(tmp_path)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 8
    assert len(set(found["digests"])) == 1
    assert found["attempts"] == [list(range(13))] * 3
    assert found["left"] == []


def test_another_model_corpus_seed_or_setting_is_refused_by_name(study, tmp_path, corpus):
    first = study("set", 2)
    model, tokenizer = tiny()
    other = tiny_model("llama", seed=5)[0]
    asked = [
        ((other, corpus, small(), 1), "model.weights: found"),
        ((model, Corpus.of(LAMPS), small(), 1), "corpus: found"),
        ((model, corpus, small(answer=Decoding(9)), 1), "settings.answer.max_tokens: found 8, "),
        ((model, corpus, small(), 3), "seed: found 1, asked for 3"),
        ((model, corpus, small(top_k=6), 1), "k: found 5, asked for 6"),
    ]
    before = sorted(path.name for path in (tmp_path / "set").iterdir())
    for (used, texts, settings, seed), message in asked:
        with pytest.raises(IncompatibleModel, match=message):
            synthesize(used, tokenizer, texts, tmp_path / "set", settings, 4, seed)
    plain = encode(tokenizer, "A text.")
    with pytest.raises(IncompatibleModel, match="turn: found"):
        synthesize(model, tokenizer, corpus, tmp_path / "set", small(), 4, 1, source=plain)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == before
    # When to give up is no part of what is made.
    assert study("set", 2, small(tries=9)).digest == first.digest


def test_a_folder_with_other_things_or_another_writer_is_refused(study, tmp_path):
    from filelock import FileLock

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InvalidArgument, match="not empty"):
        study("mine")
    study("set", 2)
    with FileLock(tmp_path / "set" / ".lock"), pytest.raises(InvalidArgument, match="another"):
        study("set", 4)


@pytest.mark.parametrize("name", ["n", "batch_size", "shard_size"])
def test_numbers_below_one_are_refused_before_anything_is_written(study, tmp_path, name):
    with pytest.raises(InvalidArgument, match=f"{name} must be at least 1"):
        study("set", **{name: 0})
    assert not (tmp_path / "set").exists()


def test_a_corpus_beyond_the_context_is_read_in_chunks(tmp_path):
    model, tokenizer = tiny_model("llama", rope="dynamic")  # 64 positions
    assert model.config.max_position_embeddings == 64
    corpus = Corpus.of(Document("a", LAMPS * 3))
    settings = small(
        kinds=(), prompts=(SeedPrompt("own", "Ask."),), question=Decoding(4), answer=Decoding(5),
        intro="{text}", chat=False,
    )  # fmt: skip
    with pytest.raises(ContextTooLong, match="tokens are left"):
        synthesize(model, tokenizer, corpus, tmp_path / "no", settings, 3)
    assert not (tmp_path / "no").exists()
    clipped = dataclasses.replace(settings, chunking=Chunking(min_tokens=4, overlong="clip"))
    made = synthesize(model, tokenizer, corpus, tmp_path / "yes", clipped, 3)
    assert len(made) == 3
    lengths = [
        stop - start for start, stop in (map(int, c.split(":")) for c in made.column("chunk"))
    ]
    assert 0 < max(lengths) < 64 * 4


def test_a_chunk_that_grows_when_it_stands_alone_is_shortened(corpus):
    from kvedit.cartridges.study.chunks import Chunk
    from kvedit.cartridges.study.reading import Student

    model, tokenizer = tiny()
    student = Student(model, tokenizer, small())
    chunk = Chunk("lamps", 0, len(LAMPS), LAMPS)
    memory = student.read(chunk, 90)
    assert 70 < memory.slots <= 90
    with pytest.raises(ContextTooLong, match="leaves no room"):
        student.read(chunk, 3)


def test_every_chunk_of_a_cover_is_prefilled_once(study, monkeypatch):
    from kvedit.cartridges.study import reading

    read = []
    real = reading.capture
    monkeypatch.setattr(reading, "capture", lambda *a, **k: read.append(a[2]) or real(*a, **k))
    settings = small(chunking=Chunking("cover", 60, 160), per_chunk=1)
    made = study("set", 12, settings, batch_size=4)
    assert len(read) == len(set(made.column("chunk"))) < 12


def test_a_tracker_is_told_counts(study):
    class Notes:
        def __init__(self):
            self.steps = []

        def log(self, step, metrics):
            self.steps.append((step, metrics))

    notes = Notes()
    study("set", 6, shard_size=2, tracker=notes, progress=True)
    assert [step for step, _ in notes.steps] == [0, 1, 2]
    assert [metrics["study/kept"] for _, metrics in notes.steps] == [2, 4, 6]
    assert all(math.isfinite(value) for _, metrics in notes.steps for value in metrics.values())


def test_settings_are_plain_data():
    settings = StudySettings(prompts=[SeedPrompt("own", "Ask.")])
    assert hash(settings) == hash(StudySettings(prompts=(SeedPrompt("own", "Ask."),)))
    assert json.loads(json.dumps(settings.to_json()))["prompts"] == [
        {"kind": "own", "text": "Ask.", "opening": ""}
    ]


def test_corpus_of_lamps_is_longer_than_a_chunk():
    tokenizer = tiny()[1]
    assert min(len(tokenizer(d.text).input_ids) for d in corpus_of_lamps()) > 2 * 40
