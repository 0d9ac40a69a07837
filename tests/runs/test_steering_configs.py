"""Groups of the steering pipelines: their YAML is what the library has; what is wrong is named."""

import copy
import dataclasses
import functools
import inspect
import json
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from kvedit.errors import InvalidArgument, KVEditError
from kvedit.evals.steering import STEP_BY_STEP, unrelated_prompts, word_problems
from kvedit.runs.condition import read_labelled
from kvedit.runs.contrasting import TEMPLATES, contrast_of
from kvedit.runs.extraction import Extraction, read_extraction
from kvedit.runs.pipelines import plan
from kvedit.runs.run import plain, recipes_folder
from kvedit.runs.styling import read_style
from kvedit.runs.ways import WAYS, _scope
from kvedit.steering import Contrast, Last, Positions, few_shot_reasoning
from kvedit.steering.scopes import Generation, as_scope

CONF = Path(__file__).resolve().parents[2] / "kvedit" / "conf"
RECIPES = ("cache_steering", "activation_steering", "cast")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Stores that a check opens are the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVEDIT_RECIPES", str(recipes_folder()))


def yaml(group, name):
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))


@functools.cache
def composed_once(*overrides):
    with initialize_config_module("kvedit.conf", version_base="1.3"):
        return plain(compose("run", overrides=list(overrides)))


def composed(*overrides):
    return copy.deepcopy(composed_once(*overrides))


def parameters(function):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }


def test_every_template_has_its_yaml():
    names = sorted(path.stem for path in (CONF / "contrast").glob("*.yaml"))
    assert names == sorted([*TEMPLATES, "few_shot_small"])
    for name, make in TEMPLATES.items():
        given, known = yaml("contrast", name), parameters(make)
        assert given.pop("template") == name
        optional = {"refusals", "answers"} & set(known)
        assert set(given) == set(known) - optional
        for key, value in given.items():
            if value != "???" and key in known and known[key] is not inspect.Parameter.empty:
                assert value == (list(known[key]) if isinstance(known[key], tuple) else known[key])


def test_extract_defaults_are_the_librarys():
    assert read_extraction(yaml("extract", "keys_values")) == Extraction()
    assert set(yaml("extract", "keys_values")) == {f.name for f in dataclasses.fields(Extraction)}


@pytest.mark.parametrize("name", sorted(WAYS))
def test_every_way_has_its_yaml(name):
    given = yaml("steering", name)
    assert given.pop("steering") == name
    assert set(given) == {field.name for field in dataclasses.fields(WAYS[name])}


def test_style_defaults_are_the_librarys():
    given = read_style(yaml("style", "default"))
    assert given == read_style({})
    assert [q.prompt for q in given.questions] == [q.prompt for q in word_problems(8, 0)]
    assert given.bystanders == tuple(unrelated_prompts(12, 0))
    assert given.markers == STEP_BY_STEP


def test_condition_defaults_are_the_librarys():
    style = read_style({})
    assert read_labelled(yaml("condition", "default"), style) == read_labelled({}, style)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_out_what_they_ask(name):
    """No question is one that a delta or a condition was found on."""
    config = composed(f"recipes={name}")
    checked = plan(config)
    steer = getattr(checked, "steer", checked)
    asked = {question.prompt for question in steer.style.questions} | set(steer.style.bystanders)
    seen = json.dumps([pair.to_json() for pair in steer.contrast.pairs])
    assert not any(text in seen for text in asked)
    assert not any(question in seen for question, _ in steer.style.examples)
    if name == "cast":
        assert not asked & {*checked.labelled.met, *checked.labelled.unmet}
        assert not any(text in seen for text in checked.labelled.unmet)


def examples():
    """Command lines in the recipes' heads."""
    for name in RECIPES:
        text = (recipes_folder() / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        for line in text.splitlines():
            if line.startswith("#   kvedit-run "):
                yield shlex.split(line[1:], comments=True)[1:]


@pytest.mark.parametrize("words", list(examples()), ids=" ".join)
def test_examples_of_the_heads_are_plans(tmp_path, words):
    (tmp_path / "pairs.jsonl").write_text('["It is good.", "It is bad."]\n', encoding="utf-8")
    plan(composed(*words))


def test_a_recipe_takes_pairs_of_a_file(tmp_path):
    pairs = [{"positive": "It is good.", "negative": "It is bad."}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    config = composed("recipes=cache_steering", "contrast=file", "contrast.path=p.jsonl")
    assert plan(config).contrast.digest == Contrast.of([("It is good.", "It is bad.")]).digest


def test_templates_make_what_they_say():
    made = contrast_of(yaml("contrast", "few_shot_reasoning") | {"pairs": 2, "shots": 1})
    assert made.digest == few_shot_reasoning(pairs=2, shots=1).digest
    replies = {"template": "style_pairs", "replies": [["Hi?", "Ahoy!", "Hello."]]}
    assert contrast_of(replies).pairs[0].positive == (("user", "Hi?"), ("assistant", "Ahoy!"))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("generation", Generation()),
        ({"last": 2}, Last(2)),
        ({"positions": [0, 8]}, Positions(0, 8)),
        ([{"last": 1}, "generation"], Last(1) | as_scope("generation")),
    ],
)
def test_scopes_are_plain_data(given, wanted):
    assert _scope(given) == wanted


def test_questions_and_bystanders_of_ones_own():
    given = read_style(
        {"questions": ["Why?", {"question": "2 + 2?", "answer": "4"}], "bystanders": ["A?", "B?"]}
    )
    assert [(q.prompt, q.answers) for q in given.questions] == [("Why?", ()), ("2 + 2?", ("4",))]
    assert given.bystanders == ("A?", "B?")


def test_problems_come_from_a_file(tmp_path):
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"One more. #### {i + 1}"} for i in range(3)
    ]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = read_style({"path": "g.jsonl", "questions": 2})
    assert {question.answers[0] for question in given.questions} <= {"1", "2", "3"}
    assert len(given.questions) == 2


def changed(recipe, **values):
    config = composed(f"recipes={recipe}")
    for place, value in values.items():
        section, _, key = place.partition("__")
        (config[section] if key else config)[key or section] = value
    return config


@pytest.mark.parametrize(
    ("recipe", "values", "message"),
    [
        ("cache_steering", {"contrast": None}, "nothing to extract from"),
        ("cache_steering", {"contrast": {"template": "few"}}, "template of a contrast 'few'"),
        ("cache_steering", {"contrast": {"pairs": 3}}, "with a template"),
        ("cache_steering", {"contrast__shot": 3}, "key of contrast 'shot'"),
        ("cache_steering", {"contrast__pairs": 0}, "pairs and shots of 1"),
        ("cache_steering", {"contrast__questions": "why"}, "contrast.questions: expected a list"),
        ("cache_steering", {"contrast": {"template": "file", "path": "absent.json"}}, "absent"),
        ("cache_steering", {"contrast": {"template": "style_pairs", "replies": [["a", "b"]]}},
         "styled reply"),
        ("cache_steering", {"document__text": "A handbook."}, "without a context"),
        ("cache_steering", {"extract__sites": ["residual"]}, "extract=keys_values"),
        ("cache_steering", {"extract__sites": ["value"]}, "site of a delta 'value'"),
        ("cache_steering", {"extract__read": 3}, "read: a number counts from the end"),
        ("cache_steering", {"extract__estimator": "median"}, "estimator 'median'"),
        ("cache_steering", {"extract__estimator": {"name": "pca", "l2": 2.0}}, "takes no l2"),
        ("cache_steering", {"extract__layers": ["two"]}, "layers: expected whole numbers"),
        ("cache_steering", {"extract__batch": 0}, "a batch of 1 or more"),
        ("cache_steering", {"extract__batch": "8"}, "extract.batch: expected a whole number"),
        ("cache_steering", {"steering__value": 1.0}, "key of steering 'value'"),
        ("cache_steering", {"steering__values": 0}, "keys and values are both 0"),
        ("cache_steering", {"steering__keys": 1, "extract__sites": ["values"]}, "keys and values"),
        ("cache_steering", {"steering__offset": ""}, "a token must be read behind the prompt"),
        ("cache_steering", {"steering__strength": None}, "give a strength, or a target_kl"),
        ("cache_steering", {"steering__target_kl": 0.2}, "give a strength, or a target_kl"),
        ("cache_steering", {"steering": {"steering": "once"}}, "way to steer 'once'"),
        ("cache_steering", {"style__questions": 0}, "style.questions: expected a number from 1"),
        ("cache_steering", {"style__questions": ["a", "a"]}, "expected different questions"),
        ("cache_steering", {"style__questions": [{"ask": "a"}]}, r"key of style.questions\[0\]"),
        ("cache_steering", {"style__bystanders": 1}, "style.bystanders: expected two or more"),
        ("cache_steering", {"style__random": []}, "style.random: expected a list of seeds"),
        ("cache_steering", {"style__examples": [["a"]]}, "style.examples: expected a number"),
        ("cache_steering", {"style__instruction": " "}, "the instruction is empty"),
        ("cache_steering", {"style__markers": "pirate"}, "style 'pirate'"),
        ("cache_steering", {"style__markers": {"name": "x", "patterns": ["("]}}, "pattern"),
        ("cache_steering", {"style__form": "csv"}, "form of a file of problems 'csv'"),
        ("cache_steering", {"style__max_new_tokens": 0}, "style.max_new_tokens: expected 1"),
        ("cache_steering", {"condition": {}}, "key of the config 'condition'"),
        ("activation_steering", {"extract__sites": ["values"]}, "extract=residual"),
        ("activation_steering", {"extract__prune": 0.5}, "values are not among the sites"),
        ("activation_steering", {"steering__scope": "answer"}, "scope: expected one of"),
        ("activation_steering", {"steering__scope": {"first": 1}}, "steering.scope: expected"),
        ("activation_steering", {"steering__scope": {"last": 0}}, "expected 1 or more tokens"),
        ("activation_steering", {"steering__operator": "mul"}, "steering operator 'mul'"),
        ("activation_steering", {"steering__target_kl": 0.0}, "target_kl: expected above 0"),
        ("activation_steering", {"steering__bracket": [0.0]}, "bracket: expected two numbers"),
        ("cast", {"condition__met": "sums"}, "condition.met: expected a list"),
        ("cast", {"condition__unmet": 0}, "condition.unmet: expected a list"),
        ("cast", {"condition__read": "first"}, "condition.read: expected mean or last"),
        ("cast", {"condition__met": ["a", "a"]}, "must differ from each other"),
        ("cast", {"condition__unmet": ["a"], "style__bystanders": ["a", "b"]}, "asked later"),
        ("cast", {"steering": {"steering": "cache", "strength": 1.0},
                  "extract__sites": ["keys", "values"]}, "goes with steering=continuous"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_values_are_refused_before_a_model_is_loaded(recipe, values, message):
    with pytest.raises(KVEditError, match=message):
        plan(changed(recipe, **values))


def test_a_stored_delta_needs_no_contrast():
    config = changed("cache_steering", extract__ref="steps")
    del config["contrast"]
    assert plan(config).contrast is None


def test_a_request_without_a_delta_is_refused():
    from kvedit.runs.steered_reuse import Request

    with pytest.raises(InvalidArgument, match="found none"):
        Request("s", {}, {})
    with pytest.raises(InvalidArgument, match="need the delta"):
        Request("s", {}, {}, prompts=["a"])
