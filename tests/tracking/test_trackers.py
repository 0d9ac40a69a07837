"""Trackers: what they write, and that heavy ones stay unimported until they are asked for."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.tracking import TRACKERS, RunFacts, library_versions, open_tracker

FACTS = RunFacts("test", {"editor": {"strength": 1.0}}, {"torch": "2"})
ROOT = Path(__file__).resolve().parents[2]


def events(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def note_everything(tracker, folder):
    with tracker:
        tracker.log(0, {"a/b": 1.5})
        tracker.log(1, {"a/b": math.nan, "a/c": math.inf})
        tracker.table("t", ("x", "y"), [(1, "one"), (2, None)])
        tracker.artifact("m/1", folder, {"digest": "00"})
    tracker.close()  # again, which does nothing


def test_jsonl_writes_one_event_per_line(tmp_path):
    note_everything(open_tracker("jsonl", tmp_path / "run", FACTS), tmp_path)
    found = events(tmp_path / "run" / "events.jsonl")
    kinds = [event.pop("event") for event in found]
    assert kinds == ["start", "log", "log", "table", "artifact", "end"]
    assert all(event.pop("time") for event in found)
    assert found[0] == {"task": "test", "config": dict(FACTS.config), "versions": {"torch": "2"}}
    assert found[1] == {"step": 0, "metrics": {"a/b": 1.5}}
    assert found[2]["metrics"] == {"a/b": "nan", "a/c": "inf"}
    assert found[3]["rows"] == [[1, "one"], [2, None]]
    assert found[4] == {"name": "m/1", "path": str(tmp_path), "metadata": {"digest": "00"}}


def test_jsonl_survives_an_exception_and_appends(tmp_path):
    def fails():
        with open_tracker("jsonl", tmp_path, FACTS) as tracker:
            tracker.log(0, {"a": 1})
            raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fails()
    assert [e["event"] for e in events(tmp_path / "events.jsonl")] == ["start", "log", "end"] * 2


def test_jsonl_refuses_events_after_its_end(tmp_path):
    tracker = open_tracker("jsonl", tmp_path, FACTS, file="e.jsonl")
    tracker.close()
    with pytest.raises(InvalidArgument, match="closed"):
        tracker.log(0, {})


def test_none_writes_nothing(tmp_path):
    note_everything(open_tracker("none", tmp_path / "run", FACTS), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_trackers_and_options_are_refused(tmp_path):
    with pytest.raises(UnknownName, match="jsonl"):
        open_tracker("json", tmp_path, FACTS)
    with pytest.raises(InvalidArgument, match="folder_name"):
        open_tracker("jsonl", tmp_path, FACTS, folder_name="x")
    with pytest.raises(InvalidArgument, match="offline"):
        open_tracker("wandb", tmp_path, FACTS, mode="dry")


def test_versions_name_what_is_installed():
    assert {"python", "torch", "transformers"} <= set(library_versions())


def test_no_tracker_is_imported_before_it_is_opened():
    code = "import sys, kvedit.tracking; print([m for m in sys.modules if 'wandb' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "wandb" in TRACKERS


OFFLINE = """
import pathlib, sys
from tests.tracking.test_trackers import FACTS, note_everything
from kvedit.tracking import open_tracker
folder = pathlib.Path(sys.argv[1])
note_everything(open_tracker("wandb", folder, FACTS), folder)
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_runs_offline(tmp_path):
    env = {**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("WANDB_API_KEY", None)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path / "run")],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
