"""The command line, end to end on a tiny model: what it prints, what it refuses, what it leaves."""

import io
import json
import os
import subprocess
import sys

import pytest

from kvedit.memory import SpanQuery
from kvedit.runs.cli import VERBS, main
from kvedit.store import Store

TEXT = (
    "The handbook of the shop. Refunds are possible within 60 days. "
    "Shipping takes three days and costs four euros."
)
MODEL = "tiny:llama"


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs a verb in an empty folder; returns status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVEDIT_STORE", raising=False)

    def call(*words):
        code = main(list(words))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "handbook.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def stored(run, document):
    """A store in the current folder with one memory, ``handbook``."""
    code, _, err = run("capture", document, "--model", MODEL, "--tag", "draft")
    assert (code, err) == (0, "")
    return run


def as_json(run, *words):
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, ""), err
    return json.loads(out)


def state(folder="memories"):
    """Everything that the names of a store point to."""
    store = Store(folder)
    return {name: [record.record for record in store.log(name)] for name in store.names()}


def test_a_whole_round(stored):
    run = stored
    (entry,) = as_json(run, "ls")
    assert (entry["name"], entry["versions"], entry["model"]) == ("handbook", 1, MODEL)
    assert entry["tags"] == ["draft"]
    shown = as_json(run, "show", "handbook")
    assert shown["text"] == TEXT
    assert " capture " in shown["lineage"][0]

    edited = as_json(
        run, "edit", "handbook", "--editor", "emphasize", "span=within 60 days", "strength=2.3",
        "layers=[0,-1]",
    )  # fmt: skip
    assert (edited["name"], edited["version"]) == ("handbook", 2)
    assert edited["edited"] == [{"name": "handbook", "version": 1, "record": entry["record"]}]
    assert edited["editors"][0]["layers"] == [0, -1]
    log = as_json(run, "log", "handbook")
    assert [record["version"] for record in log] == [2, 1]
    assert log[0]["message"] == "emphasize 'span=within 60 days' strength=2.3 'layers=[0,-1]'"

    difference = as_json(run, "diff", "handbook@{1}", "handbook")
    assert not difference["identical"]
    assert [row["bias"] for row in difference["layers"]] == pytest.approx([2.3, 0, 2.3])
    assert all(row["keys"] == row["values"] == 0 for row in difference["layers"])
    assert " emphasize " in difference["steps"]["only_b"][0]
    assert difference["steps"]["only_a"] == []

    answer = as_json(run, "ask", "handbook", "What then?", "--max-new-tokens", "5")
    assert answer["model"] == MODEL
    assert 1 <= answer["replies"][0]["tokens"] <= 5
    assert as_json(run, "rm", "handbook") == {"removed": [{"name": "handbook", "versions": 2}]}
    assert as_json(run, "ls") == []


def test_people_get_tables(stored):
    run = stored
    run("edit", "handbook", "--editor", "drop", "span=Shipping takes", "--as", "short")
    for words, expected in (
        (("ls",), "handbook"),
        (("ls", "sh*"), "short"),
        (("ls", "--tag", "draft"), "handbook"),
        (("show", "short"), "drop"),
        (("log", "short"), "short@{0}"),
        (("diff", "handbook", "short"), "only in b"),
        (("diff", "short", "short"), "no difference"),
        (("score", "handbook", "It takes", " three", " sixty"), "nats/token"),
        (("editors",), "emphasize span=… [strength]"),
        (("editors",), "reads with the model in some phases"),
        (("editors", "--json"), '"reproducibility": "by phase"'),
        (("editors", "shift"), "offset: positions to move by"),
        (("ls", "nothing*"), "holds nothing that fits"),
    ):
        code, out, err = run(*words)
        assert (code, err) == (0, "")
        assert expected in out, words


def test_edits_in_steps_and_by_digest(stored):
    record = as_json(stored, "show", "handbook")["record"]["record"]
    edited = as_json(
        stored, "edit", record[:10], "--as", "two/steps", "--message", "why",
        "--editor", "suppress", "span={text: three days, occurrence: 1}", "strength=inf",
        "--editor", "shift", "offset=3",
    )  # fmt: skip
    assert (edited["name"], edited["message"]) == ("two/steps", "why")
    assert [editor["editor"] for editor in edited["editors"]] == ["suppress", "shift"]
    rows = as_json(stored, "diff", "handbook", "two/steps")["layers"]
    assert {row["bias"] for row in rows} == {"inf"}
    assert all(row["keys"] > 0 for row in rows)


def test_sampling_is_seeded_and_streams(stored):
    options = ("--max-new-tokens", "8", "--temperature", "1.5")
    first = as_json(stored, "ask", "handbook", "And", *options, "--seed", "1")
    assert first == as_json(stored, "ask", "handbook", "And", *options, "--seed", "1")
    assert first != as_json(stored, "ask", "handbook", "And", *options, "--seed", "2")
    code, out, err = stored("ask", "handbook", "And", *options, "--seed", "1", "--stream")
    assert (code, out, err) == (0, first["replies"][0]["text"] + "\n", "")
    code, out, err = stored(
        "ask", "handbook", "And", *options, "--seed", "1", "--stream", "--json"
    )  # fmt: skip
    assert json.loads(out) == first
    assert err == first["replies"][0]["text"] + "\n"


def test_several_questions_do_not_see_each_other(stored):
    options = ("--max-new-tokens", "6")
    both = as_json(stored, "ask", "handbook", "One", "Two", *options)["replies"]
    alone = [as_json(stored, "ask", "handbook", q, *options)["replies"][0] for q in ("One", "Two")]
    assert both == alone
    assert stored("ask", "handbook", "One", "Two", *options)[1].startswith("> One\n")


def test_a_chat_is_captured_and_goes_on_as_one(run, tmp_path):
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "system", "content": "Be brief."}]), encoding="utf-8")
    run("capture", "--messages", str(chat), "--name", "chat", "--model", MODEL)
    assert "<|im_start|>system" in as_json(run, "show", "chat")["text"]
    chatted = as_json(run, "ask", "chat", "Hello", "--max-new-tokens", "8")
    plain = as_json(run, "ask", "chat", "Hello", "--max-new-tokens", "8", "--no-chat")
    assert chatted["replies"] != plain["replies"]


def test_stdin_and_the_store_of_the_environment(run, monkeypatch):
    monkeypatch.setenv("KVEDIT_STORE", "elsewhere")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert run("capture", "-", "--name", "piped", "--model", MODEL)[0] == 0
    assert list(state("elsewhere")) == ["piped"]


REFUSED = {
    "unknown editor": (("edit", "handbook", "--editor", "emphasise", "span=x"), "Did you mean"),
    "missing span": (
        ("edit", "handbook", "--editor", "drop", "span=no such words"),
        "nothing matches",
    ),
    "NaN strength": (
        ("edit", "handbook", "--editor", "emphasize", "span=days", "strength=nan"),
        "strength",
    ),
    "no number": (
        ("edit", "handbook", "--editor", "emphasize", "span=days", "strength=lots"),
        "strength",
    ),
    "unknown parameter": (("edit", "handbook", "--editor", "drop", "spam=x"), "spam"),
    "no parameter": (("edit", "handbook", "--editor", "drop", "days"), "key=value"),
    "broken list": (
        ("edit", "handbook", "--editor", "drop", "span=days", "layers=[0"),
        "YAML",
    ),
    "several without a name": (
        ("edit", "handbook", "handbook", "--editor", "drop", "span=days"),
        "--as",
    ),
    "a model for nothing": (
        ("edit", "handbook", "--editor", "drop", "span=60", "--model", MODEL),
        "--model",
    ),
    "bad name": (("edit", "handbook", "--editor", "drop", "span=60", "--as", "../x"), "name"),
    "empty file": (("capture", "empty.txt", "--model", MODEL), "holds no text"),
    "no file": (("capture", "nowhere.txt", "--model", MODEL), "can't read nowhere.txt"),
    "no JSON": (("capture", "--messages", "handbook.txt", "--model", MODEL), "no JSON"),
    "no messages": (("capture", "--messages", "empty.json", "--model", MODEL), "list of messages"),
    "unknown toy": (("capture", "handbook.txt", "--model", "tiny:llamas"), "llama"),
    "wrong model": (("ask", "handbook", "Hm", "--model", "tiny:qwen3"), "does not fit"),
    "unknown ref": (("show", "hanbook"), "Did you mean handbook"),
    "unknown version": (("diff", "handbook", "handbook@{3}"), "1 versions"),
    "one of two names": (("rm", "handbook", "handbok"), "Did you mean handbook"),
}


@pytest.mark.parametrize(("words", "expected"), REFUSED.values(), ids=REFUSED)
def test_refusals_take_one_line_and_change_nothing(stored, tmp_path, words, expected):
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    before = state()
    code, out, err = stored(*words, "--json")
    assert (code, out) == (1, "")
    assert err.startswith("kvedit: ")
    assert err.count("\n") == 1
    assert expected in err
    assert state() == before


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("frobnicate",),
        ("capture",),
        ("capture", "a", "--messages", "b"),
        ("ask", "a", "b", "--temperature", "nan"),
        ("ask", "a", "b", "--max-new-tokens", "0"),
        ("bench", "--lengths", "12,many"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_two(run, capsys, words):
    with pytest.raises(SystemExit) as error:
        run(*words)
    assert error.value.code == 2
    assert capsys.readouterr().out == ""


def test_spans_stay_text():
    from kvedit.runs.verbs.parameters import build_editor, parse_value

    for text in ("60", "true", "note: keep"):
        assert SpanQuery.of(build_editor(["drop", f"span={text}"]).span).text == text
    assert build_editor(["drop", "span={tokens: [0, 4]}"]).span.tokens == (0, 4)
    assert build_editor(["chain", "editors=[{editor: shift, offset: 2}]"]).editors[0].offset == 2
    assert parse_value("yes") == "yes"
    assert parse_value("null") is None
    assert parse_value("1e-3") == pytest.approx(1e-3)


def test_interruption_and_a_closed_pipe_are_quiet(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvedit.store.Store.ls", interrupted)
    assert run("ls") == (130, "", "kvedit: interrupted\n")


def test_every_verb_explains_itself(run, capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as done:
            run(verb.name, "--help")
        assert done.value.code == 0
        assert "--json" in capsys.readouterr().out


LIGHT = """
import sys
from kvedit.runs.cli import main
for words in (["editors"], ["ls"], ["show", "handbook"], ["log", "handbook"],
              ["diff", "handbook", "handbook"], ["rm", "handbook"]):
    assert main(words) == 0, words
loaded = {"transformers", "wandb", "hydra", "matplotlib", "accelerate"} & set(sys.modules)
sys.exit(f"loaded: {loaded}" if loaded else 0)
"""


def test_looking_loads_neither_transformers_nor_wandb(stored):
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_ends_quietly(run):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "kvedit.runs.cli", "editors"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (141, "")
