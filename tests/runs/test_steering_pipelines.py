"""The steering recipes from end to end on a tiny model; one of them with its second process."""

import json

import pytest
import torch
from hydra import compose, initialize_config_module

import kvedit as kv
from kvedit.evals.steering import Asker
from kvedit.evals.steering.entering import Entry
from kvedit.memory import Delta
from kvedit.runs.condition import met, similarities
from kvedit.runs.kinds import ask_kind, f1, kinds_table
from kvedit.runs.pipelines import run
from kvedit.runs.run import plain, recipes_folder
from kvedit.runs.steered_reuse import Request, behind, reply_at, reuse
from kvedit.runs.ways import read_way
from kvedit.steering import Condition, steered
from kvedit.store import Store
from kvedit.testing.steering import random_delta

TINY = ("model=tiny", "tracker=jsonl", "contrast.pairs=4", "contrast.shots=1", "style.questions=3",
        "style.bystanders=4", "style.max_new_tokens=4", "style.bystander_tokens=3")  # fmt: skip
ROWS = ["none", "prompt", "few-shot", "random 0", "steered"]
PROMPTS = ["How many apples are left?", "Who wrote it?", "What is 3 + 4?", "Say a word.", "Why?"]


@pytest.fixture(autouse=True, scope="module")
def elsewhere():
    """Recipes are found wherever tests run; runs set torch's threads, later tests get theirs."""
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.setenv("KVEDIT_RECIPES", str(recipes_folder()))
    yield
    patch.undo()
    torch.set_num_threads(threads)


def composed(folder, recipe, *overrides):
    with initialize_config_module("kvedit.conf", version_base="1.3"):
        words = [f"recipes={recipe}", *TINY, f"store.path={folder / 'store'}", *overrides]
        return plain(compose("run", overrides=words))


def carried_out(folder, recipe, *overrides):
    report = run(composed(folder, recipe, *overrides), folder / "out", say=lambda line: None)
    return report, json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Two questions steered in their cache, with a second process."""
    folder = tmp_path_factory.mktemp("cached")
    return folder, *carried_out(folder, "cache_steering", "steering.keys=0.5")


def test_a_second_process_goes_on_behind_the_stored_prompt(cached):
    _, report, results = cached
    assert results["bit_equal"] is True
    assert report.equal_logits == len(report.answers) == 2
    contents = {kept.content for kept in report.kept[:2]}
    assert set(results["second"]["content"].values()) == contents
    assert results["second"]["verified"] is True
    assert report.text().endswith("logits bit-equal in a second process: yes")


def test_another_logit_is_no_equality(cached):
    report = cached[1]
    first = next(iter(report.answers))
    theirs = {**report.second["answers"]}
    theirs[first] = {**theirs[first], "logits": "0" * 64}
    assert type(report)(**{**vars(report), "second": {"answers": theirs}}).equal_logits == 1


def test_only_the_last_slot_was_changed_by_the_stored_delta(cached):
    folder, report, _ = cached
    with Store(folder / "store") as store:
        memory, delta = store.get("cache_steering"), Delta.of(store.get("cache_steering/delta"))
        assert [node.name for node in memory.lineage.nodes][-1] == "steer"
    assert not memory.rules
    model, tokenizer = kv.load("tiny:llama")
    (question, *_) = report.answers
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    for index, layer in memory.layers.items():
        values, wanted = cache.layers[index].values[0], layer.values
        assert torch.allclose(wanted[:, :-1], values[:, :-1], atol=1e-5)
        moved = wanted[:, -1] - values[:, -1]
        assert torch.allclose(moved, 5.0 * delta.vectors["values"][index], atol=1e-5)
        turned = (layer.keys[:, -1] - cache.layers[index].keys[0][:, -1]).detach()
        # A rotation keeps lengths.
        added = 2.5 * delta.vectors["keys"][index].norm()
        assert float(turned.norm()) == pytest.approx(float(added), abs=1e-4)


def test_the_table_has_all_baselines(cached):
    _, report, results = cached
    assert list(report.style.names) == ROWS
    assert [row[0] for row in report.rows()] == ROWS
    assert report.style.mean("steered", "kl").value > 0
    assert report.style.mean("none", "kl").value == 0
    assert report.gain == report.style.difference("steered").value
    assert set(results["style"]["methods"]) == set(ROWS)
    assert "none 0, prompt 0, few-shot 0, random 0)" in report.headline()


def test_measures_are_beside_what_was_stored(cached):
    folder, report, _ = cached
    with Store(folder / "store") as store:
        (entry,) = store.log("cache_steering/delta")
    assert entry.metrics["style/kl"] == report.style.mean("steered", "kl").value
    norms = Delta.of(Store(folder / "store").get("cache_steering/delta")).norms()["keys"].values()
    assert entry.metrics["norm/keys"] == pytest.approx(sum(n**2 for n in norms) ** 0.5)


def test_steps_are_tracked(cached):
    lines = (cached[0] / "out" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    logs = [event for event in map(json.loads, lines) if event["event"] == "log"]
    logged = {key.partition("/seconds")[0] for event in logs for key in event["metrics"]}
    assert {"load", "extract", "style", "put", "ask", "reuse"} <= logged


def test_a_stored_delta_is_taken_as_it_is(cached, tmp_path):
    folder, first, _ = cached
    report, results = carried_out(
        tmp_path, "cache_steering", "extract.ref=cache_steering/delta", "steering.keys=0.5",
        f"store.path={folder / 'store'}", "store.name=again", "reuse.enabled=false",
    )  # fmt: skip
    assert results["second"] is None
    assert report.headline().endswith("no second process")
    assert report.delta["digest"] == first.delta["digest"]
    assert [one.content for one in report.kept] == [one.content for one in first.kept]
    assert "extract" not in report.seconds


@pytest.fixture(scope="module")
def flowing(tmp_path_factory):
    """A residual delta at a strength that was found, without a second process."""
    folder = tmp_path_factory.mktemp("flowing")
    found = carried_out(
        folder, "activation_steering", "extract.layers=[1,2]", "reuse.enabled=false"
    )
    return folder, *found


def test_strength_is_found_at_the_target(flowing):
    _, report, results = flowing
    found = report.calibrated
    target = found.target_kl
    assert abs(found.nearest.chosen_by.value / target - 1) <= 0.05
    assert report.style.of("steered").strength == found.strength
    assert report.style.of("random 0").strength == found.strength
    assert results["calibrated"]["nearest"]["strength"] == found.strength


def test_another_process_would_steer_with_the_stored_delta(flowing, tmp_path):
    folder, report, _ = flowing
    config = composed(tmp_path, "activation_steering")
    section = {**config["steering"], "target_kl": None, "strength": report.calibrated.strength}
    request = {
        "store": str(folder / "store"), "model": config["model"], "prompts": list(report.answers),
        "delta": report.kept[0].record, "steering": section,
        "ask": {"hold": "context", "offset": section["offset"], "chat": True, "max_new_tokens": 4},
    }  # fmt: skip
    theirs = reuse(Request(**json.loads(json.dumps(request))))["answers"]
    assert {p: a["logits"] for p, a in theirs.items()} == {
        p: a.logits for p, a in report.answers.items()
    }
    weaker = {**request, "steering": {**section, "strength": section["strength"] / 2}}
    other = reuse(Request(**json.loads(json.dumps(weaker))))["answers"]
    assert all(other[p]["logits"] != a.logits for p, a in report.answers.items())


def test_cast_steers_what_meets_the_condition(tmp_path):
    report, results = carried_out(
        tmp_path, "cast", "extract.layers=[2]", "condition.met=4", "condition.unmet=4",
        "reuse.enabled=false",
    )  # fmt: skip
    assert list(report.style.names) == [*ROWS, "steered if met"]
    ((header, wanted, others),) = report.tables.values()
    assert (wanted[1], others[1]) == ("3", "4")
    with Store(tmp_path / "store") as store:
        vector, (entry, *_) = Delta.of(store.get("cast/condition")), store.log("cast/condition")
        delta = Delta.of(store.get("cast"))
    told = entry.metrics
    condition = Condition(
        vector, int(told["condition/layer"]), told["condition/threshold"],
        bool(told["condition/above"]),
    )  # fmt: skip
    assert condition.layer <= min(delta.layers)
    model, tokenizer = kv.load("tiny:llama")
    asker = Asker(model, tokenizer, chat=True)
    places = asker.places(list(report.answers))
    fired = [met(condition, one) for one in similarities(asker, condition, places)]
    section = {**composed(tmp_path, "cast")["steering"], "target_kl": None}
    way = read_way({**section, "strength": report.calibrated.strength})
    one_by_one = Asker(model, tokenizer, chat=True, max_new_tokens=4, batch_size=1)
    always = Entry(lambda: way.steering(model, delta, way.strength))
    # What does not meet it keeps every bit; what does has those of steering.
    for prompt, place, one in zip(report.answers, places, fired, strict=True):
        found = reply_at(one_by_one, place, always if one else None)
        assert found.logits == report.answers[prompt].logits
    assert results["kept"][1]["name"] == "cast/condition"


@pytest.fixture(scope="module")
def tiny():
    return kv.load("tiny:llama")


@pytest.fixture(scope="module")
def asker(tiny):
    return Asker(*tiny, chat=True, max_new_tokens=4, batch_size=5)


@pytest.fixture(scope="module")
def vector(tiny):
    return random_delta(*tiny, sites=("residual",), layers=(1,), seed=4)


@pytest.mark.parametrize("read", ["mean", "last"])
def test_likeness_is_that_of_the_prompts_hidden_states(tiny, asker, vector, read):
    model, tokenizer = tiny
    found = similarities(asker, Condition(vector, 1, 0.0, read=read), asker.places(PROMPTS))
    direction = vector.vectors["residual"][1]
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
        h = states.mean(dim=0) if read == "mean" else states[-1]
        projected = torch.tanh((h @ direction) / (direction @ direction) * direction)
        wanted = (h @ projected) / (h.norm() * projected.norm())
        assert one == pytest.approx(wanted.item(), abs=1e-5)


def test_kinds_count_what_the_condition_lets_through(tiny, asker, vector):
    model, _ = tiny
    likeness = similarities(asker, Condition(vector, 1, 0.0), asker.places(PROMPTS))
    order = sorted(likeness)
    strong = random_delta(*tiny, sites=("residual",), layers=(2,), seed=5, scale=30.0)
    kinds = []
    for threshold in (order[0] - 0.1, (order[1] + order[2]) / 2, order[-1] + 0.1):
        condition = Condition(vector, 1, threshold)
        entries = [
            Entry(),
            Entry(lambda: steered(model, strong)),
            Entry(lambda one=condition: steered(model, strong, condition=one)),
        ]
        markers = composed_markers()
        kinds.append(ask_kind(asker, condition, entries, PROMPTS, markers))
    assert [kind.fired for kind in kinds] == [5, 3, 0]
    # So strong a vector changes every answer, so what changes is what was let through.
    assert [kind.changed for kind in kinds] == [(5, 5), (5, 3), (5, 0)]
    assert [kind.marked[2] for kind in kinds[::2]] == [kinds[0].marked[1], kinds[0].marked[0]]
    assert kinds[1].met == tuple(one > (order[1] + order[2]) / 2 for one in likeness)
    assert f1(kinds[1], kinds[2]) == pytest.approx(2 * 3 / (3 + 5))
    assert kinds_table(kinds[1:], ("a", "b"))[1][:3] == ["shall meet it", "5", "3"]


def composed_markers():
    from kvedit.evals.steering import Markers

    return Markers("vowels", ("[aeiou]",))


def test_a_stored_prompt_is_gone_on_behind_without_the_delta(tiny, cached):
    folder, report, _ = cached
    asker = Asker(*tiny, hold="prompt", offset="\n", chat=True, max_new_tokens=4, batch_size=1)
    with Store(folder / "store") as store:
        memory = store.get("cache_steering")
    question = next(iter(report.answers))
    assert reply_at(asker, behind(asker, memory)) == report.answers[question]
    text = kv.steering.go_on(*tiny, memory, max_new_tokens=4)
    assert text.strip() == report.answers[question].text
