"""extract on the command line, on a tiny model: pairs and templates, going on, refusals."""

import json

import pytest
import torch

import kvedit as kv
from kvedit.memory import Delta
from kvedit.runs.cli import main
from kvedit.steering import Contrast, extract, few_shot_reasoning, prune_heads, reading
from kvedit.store import Store

MODEL = ("--model", "tiny:llama")
PAIRS = [
    ("The day was bright and warm.", "The day was dull."),
    ("What a lovely song!", "A song."),
    ("Thank you ever so much, dear.", "Thanks."),
    ("I adore it.", "It is there."),
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with pairs; a fresh store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVEDIT_STORE", raising=False)
    rows = [json.dumps({"positive": a, "negative": b}) for a, b in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def tiny():
    return kv.load("tiny:llama")


@pytest.fixture
def run(capsys):
    def call(*words):
        capsys.readouterr()
        code = main(list(words))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def same(one, other):
    assert one.vectors.keys() == other.vectors.keys()
    for site, layers in one.vectors.items():
        for layer, vector in layers.items():
            assert torch.equal(vector, other.vectors[site][layer])


def test_pairs_of_a_file_become_a_delta_in_the_store(run, tiny, place):
    code, out, err = run("extract", "pairs.jsonl", "--as", "warm", "--tag", "style", *MODEL)
    assert (code, err) == (0, "")
    with Store("memories") as store:
        delta, (entry,) = Delta.of(store.get("warm")), store.log("warm")
    wanted = extract(*tiny, PAIRS)
    same(delta, wanted)
    assert delta.digest == wanted.digest
    assert (entry.message, entry.tags) == ("extract pairs.jsonl", ("style",))
    assert entry.metrics["norm/values"] == pytest.approx(
        sum(float(v.norm()) ** 2 for v in delta.vectors["values"].values()) ** 0.5
    )
    lines = out.splitlines()
    assert lines[0].startswith("warm v1")
    assert lines[1].split() == [
        "site", "layer", "norm", "best", "head", "explained", "accuracy", "ordered",
    ]  # fmt: skip
    assert len(lines) == 2 + 6 + 1


def test_json_has_every_head_and_the_file_is_the_delta(run, place):
    code, out, err = run(
        "extract", "pairs.jsonl", "--as", "warm", "--sites", "values", "--layers", "-1", "1",
        "--out", "warm.safetensors", *MODEL, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert [(f["site"], f["layer"], f["head"]) for f in data["findings"]] == [
        ("values", layer, head) for layer in (1, 2) for head in (0, 1)
    ]
    assert (data["pairs"], data["layers"], data["sites"]) == (4, [1, 2], ["values"])
    assert data["contrast"] == Contrast.read("pairs.jsonl").digest
    with Store("memories") as store:
        assert Delta.load("warm.safetensors").digest == Delta.of(store.get("warm")).digest
    assert data["digest"] == Delta.load("warm.safetensors").digest


def test_a_template_another_estimator_and_fewer_heads(run, tiny, place):
    code, _, err = run(
        "extract", "few_shot_reasoning", "--set", "pairs=3", "shots=1", "--as", "steps",
        "--estimator", "{name: pca, unit: true}", "--read=-2", "--prune", "0.5", *MODEL,
    )  # fmt: skip
    assert (code, err) == (0, "")
    contrast = few_shot_reasoning(pairs=3, shots=1)
    wanted = prune_heads(
        extract(*tiny, contrast, estimator={"name": "pca", "unit": True}, read=-2), 0.5
    )
    with Store("memories") as store:
        delta = Delta.of(store.get("steps"))
    same(delta, wanted)
    kept = [bool(vector.any()) for layer in delta.vectors["values"].values() for vector in layer]
    assert sum(kept) == 3


def test_the_longest_layers_are_shown_unless_all_are(run, monkeypatch):
    monkeypatch.setattr("kvedit.runs.verbs.extract._LAYERS", 1)
    words = ("extract", "pairs.jsonl", "--as", "warm", *MODEL)
    _, few, _ = run(*words)
    _, every, _ = run(*words, "--every")
    assert len(few.splitlines()) == 2 + 2 + 1
    assert "4 more layers with --every" in few
    assert len(every.splitlines()) == 2 + 6 + 1
    with Store("memories") as store:
        norms = Delta.of(store.get("warm")).norms()["values"]
    longest = max(norms, key=norms.get)
    assert f"values  {longest} " in few


def test_a_stopped_extraction_goes_on(run, monkeypatch):
    words = ("extract", "pairs.jsonl", "--as", "warm", "--folder", "read", "--batch", "2", *MODEL)
    pick, calls = reading.pick, []

    def stops(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return pick(*args)

    monkeypatch.setattr(reading, "pick", stops)
    code, _, err = run(*words)
    assert (code, err.splitlines()[-1]) == (130, "kvedit: interrupted")
    with Store("memories") as store:
        assert not store.names()

    def counts(*args):
        calls.append(args)
        return pick(*args)

    monkeypatch.setattr(reading, "pick", counts)
    assert run(*words)[0] == 0
    assert len(calls) == 4  # of four batches, two were there
    with Store("memories") as store:
        first = store.get("warm").digest
    # Another estimator reads nothing anew.
    assert run(*words, "--estimator", "lda")[0] == 0
    assert len(calls) == 4
    with Store("memories") as store:
        assert store.get("warm").digest != first
        assert store.get("warm@{1}").digest == first


def test_one_pair_has_no_report(run, place):
    (place / "one.json").write_text(json.dumps([["Warm.", "Cold."]]), encoding="utf-8")
    code, out, err = run("extract", "one.json", "--as", "one", *MODEL)
    assert code == 0
    assert err == "kvedit: one pair can't be held out: nothing tells how well the delta separates\n"
    assert "accuracy" not in out.splitlines()[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("absent.jsonl", "--as", "x"), "absent.jsonl"),
        (("pairs.jsonl", "--as", "../x"), "../x"),
        (("pairs.jsonl", "--as", "x", "--set", "pairs=3"), "key of contrast 'pairs'"),
        (("few_shot_reasoning", "--as", "x", "--set", "pairs=0"), "pairs and shots of 1 or more"),
        (("persona", "--as", "x"), "contrast.prompts is missing"),
        (("persona", "--as", "x", "--set", "prompts=hello", "positive=a", "negative=b"),
         "contrast.prompts: expected a list"),
        (("pairs.jsonl", "--as", "x", "--estimator", "median"), "estimator 'median'"),
        (("pairs.jsonl", "--as", "x", "--read", "7"), "counts from the end"),
        (("pairs.jsonl", "--as", "x", "--sites", "keys", "--prune", "2"), "not among the sites"),
        (("pairs.jsonl", "--as", "x", "--layers", "9"), "9"),
        (("pairs.jsonl", "--as", "x", "--prune", "99"), "keep: expected 1 to 6 heads"),
        (("pairs.jsonl", "--as", "x", "--read", "no such words"), "no such words"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals_take_one_line_and_store_nothing(run, place, words, expected):
    code, out, err = run("extract", *words, *MODEL)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("kvedit: ")
    assert expected in err
    with Store("memories") as store:
        assert not store.names()


def test_wrong_usage_exits_with_two(run):
    with pytest.raises(SystemExit) as left:
        run("extract", "pairs.jsonl", "--as", "x", "--sites", "queries", *MODEL)
    assert left.value.code == 2
