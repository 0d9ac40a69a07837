"""study, train and compose on the command line, on a tiny model: round, resuming, refusals."""

import json

import pytest
import torch

from kvedit.cartridges.study import SampleSet
from kvedit.cartridges.trainer import Trainer
from kvedit.runs.cli import main
from kvedit.runs.presets import preset
from kvedit.runs.training import read_plan
from kvedit.runs.verbs.parameters import read_settings
from kvedit.store import Store

MODEL = ("--model", "tiny:llama")
HANDBOOK = (
    "The handbook of the shop. Refunds are possible within 60 days. Lamps cost 40 euros. "
    "The shop opens at nine. Ida leads the shop."
)
FERRY = "The ferry sails at seven. A ticket costs 9 euros."
STUDY = ("--preset", "small", "--set", "filters.cut_questions=false", "question.max_tokens=12",
         "answer.max_tokens=8", "batch_size=4")  # fmt: skip
QUICK = ("--set", "steps=3", "lr=0.01")
PAIRS = ({"question": "What does a lamp cost?", "answer": "40 euros"},
         {"question": "Who leads the shop?", "answer": None},
         {"question": "When does it open?"})  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts, questions, two memories in a store, and samples of the handbook."""
    folder = tmp_path_factory.mktemp("verbs")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.delenv("KVEDIT_STORE", raising=False)
    for name, text in (("handbook", HANDBOOK), ("ferry", FERRY)):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        assert main(["capture", f"{name}.txt", *MODEL]) == 0
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)), encoding="utf-8")
    words = ("study", "handbook.txt", "--out", "samples", "-n", "5", *MODEL, *STUDY)
    assert main(list(words)) == 0
    yield folder
    patch.undo()


@pytest.fixture
def run(place, capsys):
    def call(*words):
        capsys.readouterr()
        code = main(list(words))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def as_json(run, *words):
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, ""), err
    return json.loads(out)


def train(name, *words):
    return ("train", *words, "--folder", f"runs/{name}", "--as", name)


TEXT = ("--text", "handbook.txt", "--samples", "samples", *MODEL)


def test_a_study_goes_on_where_it_was(run, place):
    first = SampleSet(place / "samples").digest
    words = ("study", "handbook.txt", "--out", "samples", *MODEL, *STUDY)
    more = as_json(run, *words, "-n", "7")
    assert (more["samples"], more["wanted"]) == (7, 7)
    assert SampleSet(place / "samples")[:5].digest == first
    assert "7 of 7 samples" in run(*words, "-n", "7")[1]
    code, out, err = run("study", "ferry.txt", "--out", "samples", *MODEL, *STUDY)
    assert (code, out) == (1, "")
    assert "corpus: found" in err


def test_a_cartridge_of_a_text(run, place):
    words = (*TEXT, "--held-out", "0.4", "--set", "steps=6", "lr=0.004", "eval_every=1")
    told = as_json(run, *train("h", *words), "--tag", "small", "--message", "why")
    assert (told["measured_on"], told["held_out"]) == ("held_out", 3)
    assert told["after"]["kl"] < told["before"]["kl"]
    assert set(told["before"]) == {"loss", "kl", "nll"}
    assert told["slots"] == told["full_slots"] // 8
    assert (told["start"]["editor"], told["start"]["budget"]) == ("attention_matching", 0.125)
    with Store("memories") as store:
        memory, (entry, *_) = store.get("h"), store.log("h")
    names = [node.name for node in memory.lineage.nodes]
    assert names == ["capture", "attention_matching", "train"]
    assert (entry.message, entry.tags) == ("why", ("small",))
    assert entry.metrics["held_out/kl"] == told["after"]["kl"]
    out = run(*train("h", *words))[1]
    assert f"kl    {told['before']['kl']:.4f}  {told['after']['kl']:.4f}" in out
    assert "no evaluation was better" not in out


def test_a_training_that_helps_nothing_says_so(run):
    out = run(*train("worse", *TEXT, "--set", "steps=2", "lr=5.0"))[1]
    assert out.endswith("or take the last step with --set best=false\n")
    last = as_json(run, *train("last", *TEXT, "--set", "steps=2", "lr=5.0", "best=false"))
    assert last["after"]["loss"] > last["before"]["loss"]


def test_one_question_is_not_split(run, place):
    (place / "one.jsonl").write_text('{"question": "Why?", "answer": "So."}', encoding="utf-8")
    words = train("one", "handbook", "--pairs", "one.jsonl", *QUICK)
    code, _, err = run(*words)
    assert code == 1
    assert "two different questions, found 1: make more samples, or hold out none" in err
    assert as_json(run, *words, "--held-out", "0")["samples"] == 1


def test_a_killed_training_goes_on(run, monkeypatch):
    words = (*TEXT, "--start", "first_tokens", "slots=8", "--set", "steps=4", "best=false",
             "checkpoint_every=1")  # fmt: skip
    whole = as_json(run, *train("whole", *words))
    made = Trainer._make_step

    def until_third(self, packs):
        if self.step == 2:
            raise KeyboardInterrupt
        return made(self, packs)

    monkeypatch.setattr(Trainer, "_make_step", until_third)
    assert run(*train("cut", *words)) == (130, "", "kvedit: interrupted\n")
    seen = []
    monkeypatch.setattr(
        Trainer, "_make_step", lambda self, packs: (seen.append(self.step), made(self, packs))[1]
    )
    again = as_json(run, *train("cut", *words))
    assert seen == [2, 3]
    assert again["content"] == whole["content"]
    assert (again["before"], again["after"]) == (whole["before"], whole["after"])


def test_a_memory_on_questions_of_ones_own_beside_others(run, place):
    words = ("handbook", "--pairs", "pairs.jsonl", "--start", "sampled_chunks", "slots=12",
             "chunk=4", "--distractor", "ferry", "--distractor-text", "ferry.txt",
             "--held-out", "0", "--set", "steps=2", "distractors=1.0")  # fmt: skip
    told = as_json(run, *train("own", *words))
    assert (told["samples"], told["held_out"], told["measured_on"]) == (3, 0, "train")
    samples = SampleSet(place / "runs" / "own" / "samples")
    assert samples.column("answer")[0] == "40 euros"
    assert samples.column("answer")[1]  # the model's own
    with Store("memories") as store:
        memory = store.get("own")
    assert len(json.loads(memory.lineage.head.parameters)["distractors"]) == 2
    assert memory.source.text == HANDBOOK
    # The same command again: samples are read, the run has ended, the result is the same.
    assert as_json(run, *train("own", *words))["content"] == told["content"]
    (place / "other.jsonl").write_text('{"question": "Why?", "answer": "So."}', encoding="utf-8")
    code, _, err = run(*train("own", "handbook", "--pairs", "other.jsonl", *QUICK))
    assert code == 1
    assert "samples of other questions" in err


@pytest.mark.parametrize(
    ("start", "slots"),
    [
        (("summary", "slots=10"), 10),
        (("text_tokens", "slots=9"), 9),
        (("random_vectors", "slots=9"), 9),
        (("truncate", "budget=11"), 11),
        (("stored", "ref=ferry"), None),
    ],
    ids=lambda part: part[0] if isinstance(part, tuple) else "",
)
def test_starts(run, place, start, slots):
    name = f"start-{start[0]}"
    told = as_json(run, *train(name, *TEXT, "--start", *start, "--set", "steps=1"))
    with Store("memories") as store:
        memory, ferry = store.get(name), store.get("ferry")
    assert told["slots"] == memory.slots
    assert memory.slots <= (slots or ferry.slots)
    assert memory.source.chat is not None  # it is asked as the handbook is


def test_samples_for_a_stored_memory_follow_it(run, place):
    words = ("study", "handbook.txt", "--out", "plain", "-n", "2", "--for", "handbook", *STUDY)
    as_json(run, *words)
    told = as_json(run, *train("plain", "handbook", "--samples", "plain", *QUICK))
    assert told["samples"] + told["held_out"] == 2
    code, _, err = run(*train("chat", "handbook", "--samples", "samples", *QUICK))
    assert code == 1
    assert "another form of context" in err
    assert "kvedit study --for NAME" in err


def test_memories_are_composed(run, place):
    with Store("memories") as store:
        handbook, ferry = store.get("handbook"), store.get("ferry")
    told = as_json(run, "compose", "handbook", "ferry", "--as", "both")
    assert told["slots"] == handbook.slots + ferry.slots
    assert [part["name"] for part in told["parts"]] == ["handbook", "ferry"]
    turned = as_json(run, "compose", "handbook", "ferry", "--as", "turned", "--order", "1,0")
    assert [part["name"] for part in turned["parts"]] == ["ferry", "handbook"]
    flat = as_json(run, "compose", "handbook", "ferry", "--as", "flat", "--no-rotate")
    with Store("memories") as store:
        both, other, still = (store.get(name) for name in ("both", "turned", "flat"))
    assert both.source.text == HANDBOOK + FERRY
    assert other.source.text == FERRY + HANDBOOK
    keys = {name: memory.layers[0].keys[:, handbook.slots :] for name, memory in
            (("both", both), ("flat", still))}  # fmt: skip
    assert torch.equal(keys["flat"], ferry.layers[0].keys)
    assert not torch.equal(keys["both"], ferry.layers[0].keys)
    assert not flat["rotate"]
    assert [node.name for node in both.lineage.nodes] == ["capture", "capture", "concat"]
    assert "slots, each at its own" in run("compose", "handbook", "ferry", "--as", "flat",
                                           "--no-rotate")[1]  # fmt: skip


REFUSED = {
    "no text": (("study", "absent.txt", "--out", "s"), "absent.txt can't be read"),
    "blank text": (("study", "blank.txt", "--out", "s"), "has no text"),
    "no such kind": (
        ("study", "handbook.txt", "--out", "s", "--kinds", "questions"),
        "kind of seed prompt 'questions'. Did you mean question",
    ),
    "no such key": (
        ("study", "handbook.txt", "--out", "s", "--set", "chunks=3"),
        "unknown key of study 'chunks'. Did you mean chunking or per_chunk",
    ),
    "no number": (
        ("study", "handbook.txt", "--out", "s", "--set", "answer.max_tokens=many"),
        "study.answer.max_tokens: expected a whole number, found 'many'",
    ),
    "a chunk that does not fit": (
        ("study", "handbook.txt", "--out", "s", "--chunk", "4", "--set",
         "answer.max_tokens=20000", *MODEL),
        "0 tokens are left; lower max_tokens",
    ),
    "twice said": (("study", "handbook.txt", "--out", "s", "--set", "n=3"), "--set n"),
    "no such start": (train("x", *TEXT, "--start", "zeros"), "unknown start 'zeros'"),
    "no such key of a start": (
        train("x", *TEXT, "--start", "first_tokens", "slot=3"),
        "unknown key of start 'slot'. Did you mean slots",
    ),
    "a start of one slot": (
        train("x", *TEXT, "--start", "first_tokens", "slots=1"),
        "whole number from 2), found 1",
    ),
    "a start above the text": (
        train("x", *TEXT, "--start", "first_tokens", "slots=9000"),
        "9000 slots were asked for and the corpus has",
    ),
    "NaN": (train("x", *TEXT, "--set", "lr=NaN"), "lr: expected a finite number above 0"),
    "nan": (train("x", *TEXT, "--set", "lr=nan"), "train.lr: expected a number, found 'nan'"),
    "no such objective": (
        train("x", *TEXT, "--set", "objective.distil=1"),
        "unknown key of train.objective 'distil'. Did you mean distill",
    ),
    "distractors without a fraction": (
        train("x", *TEXT, "--distractor", "ferry"),
        "is 0.0 and 1 distractors are named: give both",
    ),
    "no samples": (
        train("x", "handbook", "--samples", "absent"),
        "absent",
    ),
    "no questions": (train("x", "handbook", "--pairs", "blank.txt"), "holds no question"),
    "no JSON": (train("x", "handbook", "--pairs", "handbook.txt"), "line 1 is no JSON"),
    "another key": (
        train("x", "handbook", "--pairs", "bad.jsonl"),
        'line 2: expected {"question"',
    ),
    "one to compose": (("compose", "ferry", "--as", "x"), "two memories or more"),
    "a bad order": (
        ("compose", "ferry", "handbook", "--as", "x", "--order", "1,1"),
        "order: expected each number from 0 to 1 once",
    ),
    "another model": (
        ("compose", "ferry", "wide", "--as", "x"),
        "layer 0 kv_heads: 2, 4; config",
    ),
    "a memory of another model": (
        train("x", "handbook", "--pairs", "pairs.jsonl", "--model", "tiny:qwen3"),
        "fit",
    ),
    "samples of another model": (
        train("x", "--text", "handbook.txt", "--samples", "samples", "--model", "tiny:qwen3"),
        "were made with another model than tiny:qwen3",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_files(place):
    (place / "blank.txt").write_text(" \n", encoding="utf-8")
    lines = ('{"question": "Why?"}', '{"question": "Why?", "reply": "So."}')
    (place / "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert main(["capture", "ferry.txt", "--name", "wide", "--model", "tiny:gpt2"]) == 0


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize(("words", "expected"), REFUSED.values(), ids=REFUSED)
def test_refusals_take_one_line_and_change_nothing(run, place, words, expected):
    before = Store("memories").names()
    code, out, err = run(*words, "--json")
    assert (code, out) == (1, "")
    assert err.startswith("kvedit: ")
    assert err.count("\n") == 1
    assert expected in err
    assert Store("memories").names() == before
    assert not (place / "runs" / "x" / "checkpoints").exists()
    assert not (place / "s").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("study", "a.txt"),
        ("train", "a", "--samples", "s", "--as", "x"),
        ("train", "a", "--samples", "s", "--pairs", "p", "--folder", "f", "--as", "x"),
        ("train", "a", "--samples", "s", "--folder", "f", "--as", "x", "--held-out", "1"),
        ("compose", "a", "b"),
        ("compose", "a", "b", "--as", "c", "--order", "b,a"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_two(run, words):
    with pytest.raises(SystemExit) as error:
        run(*words)
    assert error.value.code == 2


def test_settings_go_below_by_dots():
    assert read_settings(["a.b=1", "a.c=x", "d=[1, 2]"]) == {"a": {"b": 1, "c": "x"}, "d": [1, 2]}
    for words in (["a"], ["a=1", "a=2"], ["a=1", "a.b=2"], [".a=1"]):
        with pytest.raises(ValueError, match="--set"):
            read_settings(words)


def test_presets_are_the_groups_options():
    changed = read_plan(preset("train", "small", {"freeze": {"keys": True}}))
    assert (changed.steps, changed.schedule, changed.freeze.keys) == (40, "linear", True)
    assert changed.freeze.sinks == 1
    assert read_plan(preset("train", "default", {})).lr == 0.02
