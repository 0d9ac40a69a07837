"""kvedit profile on a toy: files, refusals and what is printed."""

import json

import pytest

from kvedit.evals.profiling import HeadAtlas
from kvedit.runs.cli import main

PROBE = {
    "context": "Previously, the shop sold lamps. Now the shop sells clocks. It is red.",
    "span": "Now the shop sells clocks.",
    "prompt": " Today the shop sells",
    "wanted": " clocks",
    "rival": " lamps",
    "unrelated": " The colour of it is",
}


@pytest.fixture
def words(tmp_path):
    other = {**PROBE, "prompt": " In the shop you find", "unrelated": " What is red is"}
    (tmp_path / "probes.json").write_text(json.dumps([PROBE, other]))
    paths = ["--probes", str(tmp_path / "probes.json"), "--out", str(tmp_path / "atlas.json")]
    return ["profile", "--model", "tiny:llama", *paths]


def test_it_writes_an_atlas_and_a_head_file(words, tmp_path, capsys):
    pasta = tmp_path / "heads.json"
    options = ["--alpha", "0.01", "--kind", "query", "--top", "3", "--task", "shop"]
    assert main([*words, *options, "--pasta", str(pasta), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    atlas = HeadAtlas.read(tmp_path / "atlas.json")
    written = json.loads((tmp_path / "atlas.json").read_text())
    assert printed == {**written, "top": atlas.top(3).to_json()}
    assert (atlas.kind, atlas.n, atlas.task) == ("query", 2, "shop")
    assert atlas.strength == pytest.approx(4.60517, abs=1e-5)
    heads = {int(layer): found for layer, found in json.loads(pasta.read_text()).items()}
    assert sum(map(len, heads.values())) == 3
    assert {(i, h) for i, found in heads.items() for h in found} == set(atlas.top(3).pairs)


def test_a_table_for_people(words, capsys):
    assert main([*words, "--strength", "2", "--search", "greedy", "--count", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("layer.kv head")
    assert "on 2 probes in" in shown and "unrelated KL" in shown


def test_a_second_start_refuses_another_strength(words, capsys):
    assert main([*words, "--strength", "2"]) == 0
    assert main([*words, "--strength", "3"]) == 1
    said = capsys.readouterr().err
    assert "atlas.cases.jsonl holds" in said and "strength" in said


def test_it_says_that_nothing_unrelated_was_asked(words, tmp_path, capsys):
    bare = {key: value for key, value in PROBE.items() if key != "unrelated"}
    (tmp_path / "probes.json").write_text(json.dumps([bare]))
    assert main([*words, "--strength", "2", "--search", "layers"]) == 0
    found = capsys.readouterr()
    assert "was not measured" in found.err and "unrelated KL" not in found.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "1"], "--alpha must lie"),
        (["--strength", "-1"], "strength must be above 0"),
        (["--strength", "1", "--pasta", "no/such/file"], "no such folder"),
        (["--strength", "1", "--search", "coarse", "--layers", "9"], "3 layers"),
    ],
)
def test_wrong_options_are_one_line(words, options, message, capsys):
    assert main([*words, *options]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kvedit:")]
    assert len(said) == 1 and message in said[0]


def test_one_of_strength_and_alpha(words):
    for options in ([], ["--strength", "1", "--alpha", "0.1"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, *options])
        assert ended.value.code == 2
