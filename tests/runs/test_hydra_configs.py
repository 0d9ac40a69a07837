"""Every YAML composes and means something: recipes, experiments, editors and what is refused."""

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from kvedit.editors import REGISTRY, build
from kvedit.errors import InvalidArgument, KVEditError, UnknownName
from kvedit.runs.pipelines import PIPELINES, plan
from kvedit.runs.run import plain, recipes_folder
from kvedit.runs.targets import check_keys, refuse_targets

CONF = Path(__file__).resolve().parents[2] / "kvedit" / "conf"
GROUPS = ("recipes", "experiments")
RUNNABLE = [
    (group, str(path.relative_to(recipes_folder() / group).with_suffix("")))
    for group in GROUPS
    for path in sorted((recipes_folder() / group).rglob("*.yaml"))
]
EDITORS = sorted(path.stem for path in (CONF / "editor").glob("*.yaml"))
FILLED = {"span": "refunds", "spans": ["refunds", "days"], "offset": 3, "phase": "decode",
          "apply": "bias", "question": "How long?"}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The current folder has no recipes: they are found all the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVEDIT_RECIPES", str(recipes_folder()))


def composed(*overrides):
    with initialize_config_module("kvedit.conf", version_base="1.3"):
        return plain(compose("run", overrides=list(overrides)))


def smoke():
    return composed("recipes=smoke")


def test_there_are_recipes_and_experiments():
    assert {group for group, _ in RUNNABLE} == set(GROUPS)


@pytest.mark.parametrize(("group", "name"), RUNNABLE, ids=lambda part: part)
def test_every_recipe_and_experiment_is_a_valid_plan(group, name):
    config = composed(f"{group}={name}")
    checked = plan(config)
    assert checked.config is config
    assert config["pipeline"] in PIPELINES


def test_every_editor_has_its_yaml():
    assert list(REGISTRY) == EDITORS


@pytest.mark.parametrize("name", EDITORS)
def test_editor_yaml_is_the_dataclass(name):
    given = OmegaConf.to_container(OmegaConf.load(CONF / "editor" / f"{name}.yaml"))
    assert given.pop("editor") == name
    assert list(given) == [field.name for field in dataclasses.fields(REGISTRY.load(name))]
    missing = {key for key, value in given.items() if value == "???"}
    build(editor=name, **{**given, **{key: FILLED[key] for key in missing}})


@pytest.mark.parametrize("model", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_models_differ_in_values_only(model):
    keys = set(OmegaConf.load(CONF / "model" / f"{model}.yaml"))
    assert keys == set(OmegaConf.load(CONF / "model" / "smollm2.yaml"))


def test_a_chain_is_built_from_mappings():
    parts = "[{editor: drop, span: a}, {editor: emphasize, span: b, strength: 2}]"
    config = composed("recipes=smoke", "editor=chain", "~editor.span", "~editor.strength",
                      f"editor.editors={parts}")  # fmt: skip
    assert [type(part).__name__ for part in plan(config).editor.editors] == ["Drop", "Emphasize"]


@pytest.mark.parametrize(
    "place",
    [
        lambda config: config["editor"].update({"_target_": "os.system"}),
        lambda config: config["model"].update({"deep": [{"_target_": "os.system"}]}),
        lambda config: config["editor"].update(span={"text": "a", "_partial_": True}),
    ],
    ids=["editor", "in a list", "in a span"],
)
def test_nothing_is_instantiated(place):
    config = smoke()
    place(config)
    with pytest.raises(InvalidArgument, match="instantiates nothing"):
        plan(config)


def test_refusal_names_the_place():
    with pytest.raises(InvalidArgument, match=r"a\.b\[1\]\._target_"):
        refuse_targets({"a": {"b": [{}, {"_target_": "x"}]}})


@pytest.mark.parametrize(
    ("section", "key"),
    [("editor", "strengths"), ("model", "named"), ("answer", "max_tokens"), ("store", "folder"),
     ("document", "file"), ("questions", "other"), ("reuse", "repeat"), ("capture", "layer")],
)  # fmt: skip
def test_unknown_keys_are_named(section, key):
    config = smoke()
    config[section][key] = 1
    with pytest.raises(UnknownName, match=f"key of {section} '{key}'"):
        plan(config)


def test_missing_keys_are_named():
    with pytest.raises(InvalidArgument, match=r"store\.path is missing"):
        check_keys("store", lambda path: path, {})


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("document", {"text": None}, "no document"),
        ("document", {"path": "absent.txt"}, "absent.txt"),
        ("editor", {}, "nothing to do"),
        ("editor", {"editor": "emphasise"}, "Did you mean emphasize"),
        ("questions", {"edited": {"text": None}}, "questions.edited.text: expected a text"),
        ("questions", {"edited": {"text": " "}}, "expected a question"),
        ("questions", {"edited": {"text": "a?"}, "unrelated": ["a?"]}, "once"),
        ("store", {"path": "s", "name": "no spaces"}, "no spaces"),
    ],
)
def test_bad_values_are_refused_before_a_model_is_loaded(section, values, message):
    config = smoke()
    config[section] = values
    with pytest.raises(KVEditError, match=message):
        plan(config)


def test_a_missing_value_is_named():
    with pytest.raises(InvalidArgument, match=r"set it with editor\.span"):
        composed("editor=drop")


def test_documents_are_read_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("Hello.\n", encoding="utf-8")
    (tmp_path / "b.json").write_text('[{"role": "user", "content": "Hi"}]', encoding="utf-8")
    config = smoke()
    config["document"].update(path="a.txt", role=None, instruction=None)
    assert plan(config).context == "Hello."
    config["document"].update(path="b.json")
    assert plan(config).context == [{"role": "user", "content": "Hi"}]
