"""The pipeline of serving on a tiny model: a real second process, asked over HTTP."""

import json
import os
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_module

import kvedit as kv
from kvedit.errors import InvalidArgument, KVEditError, UnknownName
from kvedit.models import load
from kvedit.runs import serve_pipeline
from kvedit.runs.endpoint import serving
from kvedit.runs.pipelines import plan, run
from kvedit.runs.run import plain, recipes_folder
from kvedit.store import Store

TINY = ("recipes=serve", "model=tiny", "tracker=jsonl", "answer.max_new_tokens=6",
        "reuse.repeats=2", "document.text='Now refunds are possible for 60 days. No lamps.'",
        "document.instruction=null", "editor.span='for 60 days'", "editor.strength=4",
        "questions.unrelated=['Any lamps?']", "serving.together=3")  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def recipes():
    """Recipes are found wherever tests run."""
    patch = pytest.MonkeyPatch()
    patch.setenv("KVEDIT_RECIPES", str(recipes_folder()))
    yield
    patch.undo()


def composed(folder, *overrides):
    with initialize_config_module("kvedit.conf", version_base="1.3"):
        place = f"store.path={folder / 'store'}"
        return plain(compose("run", overrides=[*TINY, place, *overrides]))


@pytest.mark.slow
def test_an_endpoint_answers_from_both_versions(tmp_path):
    report = run(composed(tmp_path), tmp_path / "out", say=lambda line: None)
    assert [(each.side, each.question) for each in report.exchanges] == [
        (side, text)
        for text in ("What is the refund window?", "Any lamps?")
        for side in ("before", "after")
    ]
    assert report.equal == 4
    assert report.distance < 1e-4
    before, after = report.exchanges[:2]
    assert before.alone != after.alone
    assert after.cached == report.slots
    assert len(after.streamed) == 2
    assert 0 < after.first <= after.whole
    with pytest.raises(ProcessLookupError):
        os.kill(report.pid, 0)
    with Store(tmp_path / "store") as store:
        assert [record.version for record in store.log("serve")] == [2, 1]
        assert store.show("serve").record.record == report.record
    written = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert written["equal"] == 4
    assert report.headline().startswith("serve: 4 of 4 answers over HTTP equal to kv.generate")
    assert len(report.rows()) == 4
    lines = (tmp_path / "out" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [next(iter(json.loads(one)["metrics"])) for one in lines if '"metrics"' in one]
    assert [name.split("/")[0] for name in logged] == [
        "load", "capture", "edit", "put", "answer", "serve",
    ]  # fmt: skip


def test_a_difference_is_told():
    exchange = serve_pipeline.Exchange(
        "after", "Why?", "Because.", (-1.0, -2.0), "Because.", ("Because.",), "Because.",
        (-1.0, -2.5), 5, 0.1, 0.2,
    )  # fmt: skip
    assert exchange.equal
    assert exchange.distance == pytest.approx(0.5)
    for name, other in (("alone", "No."), ("crowded", "No."), ("streamed", ("Because.", "No."))):
        assert not replace(exchange, **{name: other}).equal
    short = replace(exchange, logprobs=(-1.0,))
    assert not short.equal
    assert short.distance == float("inf")


def test_a_text_goes_on_as_text(tmp_path):
    checked = plan(composed(tmp_path, "document.role=null", "answer.stop=['.']"))
    model, tokenizer = load("tiny:llama")
    text = kv.capture(model, tokenizer, checked.context)
    path, body = serve_pipeline._body(checked, "one", text, "Why?")
    assert path == "completions"
    assert body == {
        "model": "one", "prompt": "Why?", "max_tokens": 6, "stop": ["."], "logprobs": 0,
    }  # fmt: skip
    chat = kv.capture(model, tokenizer, [{"role": "system", "content": "Hm."}])
    path, body = serve_pipeline._body(checked, "one", chat, "Why?")
    assert path == "chat/completions"
    assert body["messages"] == [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        (("reuse.enabled=false",), InvalidArgument, "enabled=true"),
        (("reuse.verify=off",), InvalidArgument, "verify=full"),
        (("model.revision=main",), InvalidArgument, "revision"),
        (("serving.patience=0",), InvalidArgument, "patience above 0"),
        (("serving.together=0",), InvalidArgument, "together from 1"),
        (("+serving.port=1",), UnknownName, "key of serving 'port'"),
        (("~serving",), InvalidArgument, "lacks serving"),
        (("editor=null",), InvalidArgument, "choose an editor"),
    ],
    ids=lambda part: part[0] if isinstance(part, tuple) else "",
)
def test_plans_are_refused(tmp_path, changes, error, expected):
    if changes == ("editor=null",):
        config = composed(tmp_path) | {"editor": None}
    else:
        config = composed(tmp_path, *changes)
    with pytest.raises(error, match=expected):
        plan(config)


def test_an_endpoint_that_does_not_start_says_why():
    with pytest.raises(KVEditError, match=r"ended before it served: .*unrecognized arguments"):
        with serving(["--frobnicate"], 1, 120):
            raise AssertionError("it runs")
