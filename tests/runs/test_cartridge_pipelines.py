"""The cartridge recipes from end to end on a tiny model; one of them with its second process."""

import json

import pytest
import torch
from hydra import compose, initialize_config_module

import kvedit as kv
from kvedit.cartridges.study import SampleSet
from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.runs.pipelines import plan, run
from kvedit.runs.run import plain, recipes_folder
from kvedit.store import Store

TINY = ("model=tiny", "tracker=jsonl", "recall.max_new_tokens=4")
STUDY = ("study.n=4", "study.filters.cut_questions=false", "study.question.max_tokens=12",
         "study.answer.max_tokens=8")  # fmt: skip
SHORT = ("document.text='Lamps cost 40 euros. The shop opens at nine. Ida leads the shop.'",)


def composed(folder, *overrides):
    with initialize_config_module("kvedit.conf", version_base="1.3"):
        config = plain(compose("run", overrides=[f"store.path={folder / 'store'}", *overrides]))
    config["recall"]["questions"] = config["recall"]["questions"][:: max(1, 4)]
    return config


@pytest.fixture(autouse=True, scope="module")
def recipes():
    """Recipes are found wherever tests run."""
    patch = pytest.MonkeyPatch()
    patch.setenv("KVEDIT_RECIPES", str(recipes_folder()))
    yield
    patch.undo()


def carried_out(folder, *overrides):
    report = run(composed(folder, *overrides), folder / "out", say=lambda line: None)
    return report, json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cartridge of the handbook, and what its run wrote."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, *carried_out(
        folder, "recipes=train_cartridge", *TINY, *STUDY, "train.steps=3", "reuse.repeats=1"
    )


def test_training_lowers_the_held_out_loss(trained):
    facts = trained[2]["facts"]
    assert facts["held-out kl best"] < facts["held-out kl before"]
    assert facts["samples"] + facts["samples held out"] == 4


def test_sides_have_equal_slots(trained):
    sizes = {name: size.kept for name, size in trained[1].recall.sizes.items()}
    assert list(sizes) == ["full", "no context", "truncation", "start", "trained"]
    assert sizes["truncation"] == sizes["start"] == sizes["trained"] < sizes["full"] / 7


def test_gain_is_the_difference_of_kl(trained):
    means = trained[2]["recall"]["memories"]
    kl = {name: means[name]["metrics"]["kl"]["value"] for name in means}
    assert kl["full"] == pytest.approx(0, abs=1e-6)
    assert trained[1].gain == pytest.approx(kl["truncation"] - kl["trained"])


def test_a_second_process_answers_alike(trained):
    _, report, results = trained
    assert results["bit_equal"] is True
    assert results["second"]["content"] == report.kept[0].content
    assert report.text().endswith("logits bit-equal in a second process: yes")


def test_lineage_and_metrics_are_in_the_store(trained):
    folder, report, _ = trained
    with Store(folder / "store") as store:
        memory, (entry, *_) = store.get("train_cartridge"), store.log("train_cartridge")
    names = [node.name for node in memory.lineage.nodes]
    assert names == ["capture", "attention_matching", "train"]
    assert "attention_matching" in memory.lineage.describe()
    assert entry.metrics["recall/kl"] == report.recall.mean("trained", "kl").value


def test_steps_of_training_are_tracked_in_order(trained):
    lines = (trained[0] / "out" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    logs = [event for event in map(json.loads, lines) if event["event"] == "log"]
    numbers = [event["step"] for event in logs]
    assert numbers == sorted(numbers)
    assert {"train/loss", "eval/kl"} <= {key for event in logs for key in event["metrics"]}


def test_samples_that_are_there_are_used_again(trained, tmp_path):
    samples = trained[0] / "out" / "samples"
    report, results = carried_out(
        tmp_path, "recipes=train_cartridge", *TINY, f"samples.folder={samples}", "train.steps=3",
        "reuse.enabled=false",
    )  # fmt: skip
    assert report.second is None
    assert results["bit_equal"] is None
    assert report.kept[0].content == trained[1].kept[0].content
    assert not (tmp_path / "out" / "samples").exists()


@pytest.mark.parametrize(
    ("start", "slots"),
    [("first_tokens", 12), ("text_tokens", 12), ("random_vectors", 12), ("sampled_chunks", 12)],
)
def test_starts_by_name(trained, tmp_path, start, slots):
    samples = trained[0] / "out" / "samples"
    options = ["start.chunk=4"] if start == "sampled_chunks" else []
    report, _ = carried_out(
        tmp_path, "recipes=train_cartridge", *TINY, f"samples.folder={samples}",
        f"start={start}", f"start.slots={slots}", "train.steps=1", "samples.held_out=null",
        "reuse.enabled=false", *options,
    )  # fmt: skip
    assert report.recall.sizes["trained"].kept == slots
    with Store(tmp_path / "store") as store:
        memory = store.get("train_cartridge")
    # Prompts follow a cartridge of the handbook as they follow the handbook.
    assert memory.source is not None
    assert memory.source.chat is not None


def short(trained, tmp_path, *options):
    samples = trained[0] / "out" / "samples"
    return carried_out(
        tmp_path, "recipes=train_cartridge", *TINY, f"samples.folder={samples}",
        "reuse.enabled=false", *options,
    )  # fmt: skip


def test_a_summary_is_a_start_that_stands_for_the_corpus(trained, tmp_path):
    report, results = short(trained, tmp_path, "start=summary", "start.slots=10", "train.steps=3")
    assert report.recall.sizes["start"].slots <= 10
    facts = results["facts"]
    assert facts["start"] == "summary"
    assert facts["held-out kl best"] < facts["held-out kl before"]
    with Store(tmp_path / "store") as store:
        memory = store.get("train_cartridge")
    assert memory.source.chat is not None
    assert [node.name for node in memory.lineage.nodes][-2:] == ["stand_for", "train"]


def test_a_stored_cartridge_goes_on_being_trained(trained, tmp_path):
    path = trained[0] / "store"
    with Store(path) as store:
        before = store.get("train_cartridge")
    report, results = short(
        trained, tmp_path, "start=stored", "start.ref=train_cartridge", "train.steps=2",
        f"store.path={path}", "store.name=further",
    )  # fmt: skip
    facts = results["facts"]
    # What the first training ended with is what the second begins with.
    assert facts["held-out kl before"] == pytest.approx(trained[2]["facts"]["held-out kl best"])
    with Store(path) as store:
        memory = store.get("further")
    names = [node.name for node in memory.lineage.nodes]
    assert names == ["capture", "attention_matching", "train", "train"]
    assert before.lineage.head.id in memory.lineage.head.inputs


def test_attention_outputs_are_matched_to_the_full_context(trained, tmp_path):
    report, results = short(
        trained, tmp_path, "start=first_tokens", "start.slots=12", "train.steps=3",
        "train.objective.attention=0.5", "train.objective.distill=0.0",
    )  # fmt: skip
    with Store(tmp_path / "store") as store:
        memory = store.get("train_cartridge")
    node = memory.lineage.head
    told = json.loads(node.parameters)
    assert told["plan"]["objective"] == {"distill": 0.0, "next_token": 0.0, "attention": 0.5}
    model, tokenizer = kv.load("tiny:llama")
    material = plan(composed(tmp_path, "recipes=train_cartridge", *TINY)).material
    assert told["teacher"] == kv.capture(model, tokenizer, material.context(tokenizer)).digest
    lines = (tmp_path / "out" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [event["metrics"] for event in map(json.loads, lines) if event["event"] == "log"]
    losses = [metrics["eval/loss"] for metrics in logged if "eval/loss" in metrics]
    assert min(losses[1:]) < losses[0]


def test_distractors_are_named_in_the_recipe(trained, tmp_path):
    (tmp_path / "ferry.txt").write_text("The ferry sails at seven.", encoding="utf-8")
    path = trained[0] / "store"
    with Store(path) as store:
        other = store.get("train_cartridge")
    named = f"distractors=[{{ref: train_cartridge}}, {{path: '{tmp_path / 'ferry.txt'}'}}]"
    _, results = short(
        trained, tmp_path, "start=first_tokens", "start.slots=8", "train.steps=2",
        "train.distractors=1.0", "train.max_distractors=2", named, f"store.path={path}",
        "store.name=beside",
    )  # fmt: skip
    assert results["facts"]["distractors"] == 2
    with Store(path) as store:
        memory = store.get("beside")
    told = json.loads(memory.lineage.head.parameters)
    assert len(told["distractors"]) == 2
    assert told["distractors"][0] == other.digest


def test_samples_behind_another_form_of_context_are_refused(trained, tmp_path):
    with pytest.raises(IncompatibleModel, match="another form of context") as refused:
        short(trained, tmp_path, "document.role=null", "train.steps=1")
    assert "Question: Which one?" in str(refused.value)


def test_study_makes_a_folder_and_goes_on(tmp_path):
    folder = tmp_path / "samples"
    options = ("recipes=self_study", "model=tiny", "tracker=none", *STUDY, f"study.folder={folder}")
    config = composed_study(tmp_path, *options)
    first = run(config, tmp_path / "a", say=lambda line: None)
    config["study"]["n"] = 6
    more = run(config, tmp_path / "b", say=lambda line: None)
    assert (first.samples, more.samples) == (4, 6)
    assert SampleSet(folder)[:4].digest == first.digest
    assert SampleSet(folder).digest == more.digest
    assert f"6 of 6 samples from {more.attempts} attempts" in more.text()


def composed_study(folder, *overrides):
    with initialize_config_module("kvedit.conf", version_base="1.3"):
        return plain(compose("run", overrides=[*overrides, f"store.path={folder / 'store'}"]))


def test_study_without_samples_says_why(tmp_path):
    config = composed_study(
        tmp_path, "recipes=self_study", "model=tiny", "tracker=none", "study.n=1",
        "study.filters.min_answer_tokens=400", "study.answer.max_tokens=4",
        "study.question.max_tokens=12",
    )  # fmt: skip
    with pytest.raises(InvalidArgument, match="none of 4 attempts"):
        run(config, tmp_path / "out", say=lambda line: None)
    assert not (tmp_path / "out" / "results.json").exists()


def test_attention_matching_stores_a_servable_variant(tmp_path):
    report, results = carried_out(
        tmp_path, "recipes=attention_matching", *TINY, *SHORT, "editor.budget=0.4",
        "reuse.enabled=false",
    )  # fmt: skip
    assert [kept["name"] for kept in results["kept"]] == [
        "attention_matching", "attention_matching/servable",
    ]  # fmt: skip
    assert [kept["servable"] for kept in results["kept"]] == [False, True]
    with Store(tmp_path / "store") as store:
        biased, plain_one = (store.get(kept.name) for kept in report.kept)
    assert any(layer.bias is not None for layer in biased.layers.values())
    assert plain_one.servable()
    assert {"snap_kv", "knorm", "truncation"} <= set(report.recall.names)
    kept = {name: report.recall.sizes[name].kept for name in ("snap_kv", "truncation")}
    assert set(kept.values()) == {report.recall.sizes["attention_matching"].kept}


def test_compose_tries_both_orders(tmp_path):
    report, results = carried_out(tmp_path, "recipes=compose", *TINY, "reuse.enabled=false")
    assert {"ferry + orchard", "orchard + ferry", "ferry alone"} <= set(report.recall.names)
    assert results["facts"]["orders"] == 2
    with Store(tmp_path / "store") as store:
        memory = store.get("compose")
    names = [node.name for node in memory.lineage.nodes]
    assert names.count("capture") == 2
    assert names[-1] == "concat"
    parts = [report.recall.sizes[f"{name} alone"].slots for name in ("ferry", "orchard")]
    assert memory.slots == sum(parts)


def test_compose_takes_stored_parts_of_the_same_text(tmp_path):
    config = composed(tmp_path, "recipes=compose", *TINY, "reuse.enabled=false")
    config["editor"] = None
    first = run(config, tmp_path / "out", say=lambda line: None)
    config["parts"]["orchard"]["ref"] = "compose"
    again = run(config, tmp_path / "out2", say=lambda line: None)
    # The composition ends with the orchard's chat, so it stands for that text.
    assert again.recall.sizes["orchard alone"].slots == first.recall.sizes["ferry + orchard"].slots
    config["parts"]["ferry"]["ref"] = "compose"
    with pytest.raises(InvalidArgument, match="another text"):
        run(config, tmp_path / "out3", say=lambda line: None)


@pytest.fixture(autouse=True, scope="module")
def threads():
    """Runs set torch's threads; later tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
