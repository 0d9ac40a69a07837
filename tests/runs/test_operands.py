"""Operands in runs: made once per model, kept in the store, given to the editors that need them."""

from __future__ import annotations

import json

import pytest

import kvedit as kv
from kvedit.editors import Chain, Emphasize, Steer, build
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.memory.operand import operand_kind
from kvedit.models.tiny import tiny_model
from kvedit.runs.cli import main
from kvedit.runs.operands import make, operand_name, stored, supply
from kvedit.testing.steering import random_delta

TEXT = "The thing in the box is the answer. The refund window is 60 days. That is all."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model and a store with its query samples."""
    model, tokenizer = tiny_model("llama")
    store = kv.Store(tmp_path_factory.mktemp("operands"))
    chain = Chain((Emphasize(span="60 days", strength=1.0), build("compile")))
    said: list[str] = []
    first = supply(chain, store, model, tokenizer, said.append)
    assert len(said) == 1
    return model, tokenizer, store, chain, first


def test_an_operand_is_made_once_and_then_taken_from_the_store(made):
    model, tokenizer, store, chain, first = made
    said: list[str] = []
    again = supply(chain, store, model, tokenizer, said.append)
    assert said == []
    assert [operand_kind(one) for one in again] == ["queries"]
    assert again[0].digest == first[0].digest
    assert supply(Emphasize(span="60 days", strength=1.0), store, model, tokenizer) == []


def test_another_model_has_operands_of_its_own(made):
    _, _, store, _, first = made
    other = kv.models.inspect(*tiny_model("llama", seed=1)).spec
    assert stored(store, "queries", other) is None
    assert operand_name("queries", other) != operand_name("queries", first[0].model)


def test_an_unknown_kind_is_refused(made):
    with pytest.raises(UnknownName, match="kind of operand"):
        make("query", *made[:2])


def test_a_delta_is_given_behind_the_memory_and_never_made(tmp_path, capsys, monkeypatch):
    place, words = ("--store", str(tmp_path / "store")), ("--editor", "steer", "values=3")
    model, tokenizer = kv.load("tiny:llama")
    delta = random_delta(model, tokenizer)
    with kv.Store(tmp_path / "store") as store:
        store.put(kv.capture(model, tokenizer, TEXT), "box")
        store.put(delta.operand(), "calm")
        with pytest.raises(InvalidArgument, match="none was given"):
            supply(Chain((Steer(),)), store, model, tokenizer)
    # Found out from the store alone.
    with monkeypatch.context() as patch:
        patch.setattr("kvedit.runs.verbs.edit.load_model_of", None)
        assert main(["edit", "box", *words, *place]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "`kvedit extract PAIRS --as DELTA`" in err
    assert "`kvedit edit NAME DELTA --as NEW --editor steer KEY=VALUE ...`" in err
    assert main(["edit", "box", "calm", "--as", "new", *words, *place]) == 0
    with kv.Store(tmp_path / "store") as store:
        assert store.get("new").digest == Steer(values=3)(store.get("box"), delta.operand()).digest


def test_verbs_calibrate_compile_and_replay(tmp_path, capsys):
    place = ["--store", str(tmp_path / "store")]
    text = tmp_path / "box.txt"
    text.write_text(TEXT)

    def run(*words):
        assert main([*words, *place, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    run("capture", str(text), "--model", "tiny:llama")
    first = run("calibrate", "--model", "tiny:llama")
    again = run("calibrate", "--model", "tiny:llama")
    assert again["record"] == first["record"]
    bias = ("--editor", "emphasize", "span=60 days", "strength=1.0")
    run("edit", "box", *bias, "--editor", "compile", "mean_tolerance=100", "spread_tolerance=100")
    with kv.Store(tmp_path / "store") as store:
        compiled = store.get("box")
        assert all(layer.bias is None for layer in compiled.layers.values())
        assert compiled.servable()
        assert compiled.lineage.head.name == "compile"
        # The step names the step that made the operand: a replay finds it in the store.
        operand = store.get(first["name"])
        assert operand.lineage.head.id in compiled.lineage.head.inputs
    log = run("log", "box")
    assert "compile" in json.dumps(log)
    assert run("replay", "box")["bit_equal"] is True
