"""Groups of the cartridge pipelines: their YAML is what the library has; what is wrong is named."""

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from kvedit.cartridges import TrainPlan
from kvedit.cartridges.study import StudySettings
from kvedit.errors import KVEditError
from kvedit.runs.asking import read_recall
from kvedit.runs.material import read_material
from kvedit.runs.pipelines import plan
from kvedit.runs.run import plain, recipes_folder
from kvedit.runs.starting import STARTS
from kvedit.runs.studying import read_study

CONF = Path(__file__).resolve().parents[2] / "kvedit" / "conf"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Stores that a check opens are the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVEDIT_RECIPES", str(recipes_folder()))


def yaml(group, name):
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))


def composed(*overrides):
    with initialize_config_module("kvedit.conf", version_base="1.3"):
        return plain(compose("run", overrides=list(overrides)))


def test_study_defaults_are_the_librarys():
    given = yaml("study", "default")
    assert set(given) == set(inspect.signature(read_study).parameters) - {"material"}
    material = read_material(text="Lamps cost 40 euros.", role="system")
    assert read_study(material, **given).settings == StudySettings()


def test_train_defaults_are_the_librarys():
    given = yaml("train", "default")
    assert TrainPlan.of(given) == TrainPlan()
    assert set(given) == set(TrainPlan().parameters())


def test_every_start_has_its_yaml():
    assert sorted(path.stem for path in (CONF / "start").glob("*.yaml")) == sorted(STARTS)
    for name, make in STARTS.items():
        given = yaml("start", name)
        assert given.pop("start") == name
        assert set(given) <= set(list(inspect.signature(make).parameters)[1:])


def test_small_trains_what_its_recipe_says():
    checked = plan(composed("recipes=train_cartridge", "train.steps=7", "train.freeze.keys=true"))
    assert (checked.train.steps, checked.train.freeze.keys) == (7, True)
    assert checked.editor.budget == 0.125
    assert checked.study.settings.prompts


def test_baselines_follow_the_budget():
    editors = plan(composed("recipes=attention_matching", "editor.budget=0.2")).editors
    assert {editor.budget for editor in editors.values()} == {0.2}
    assert editors["attention_matching, servable"].fold_bias


def test_samples_of_a_folder_need_no_study():
    config = composed("recipes=train_cartridge", "samples.folder=elsewhere")
    del config["study"]
    assert plan(config).study is None


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("self_study", {"pipeline": "studies"}, "pipeline 'studies'"),
        ("self_study", {"begin": {}}, "key of the config 'begin'"),
        ("self_study", {"document.role": "user"}, "role"),
        ("self_study", {"document.text": None}, "no document"),
        ("self_study", {"study.n": 0}, "n and batch_size"),
        ("self_study", {"study.kinds": ["questions"]}, "kind of seed prompt 'questions'"),
        ("self_study", {"study.chunking.max": 3}, "key of study.chunking 'max'"),
        ("self_study", {"study.chunking.min_tokens": 900}, "min"),
        ("train_cartridge", {"train.lrs": 1}, "key of train 'lrs'"),
        ("train_cartridge", {"train.freeze.sink": 1}, "key of train.freeze 'sink'"),
        ("train_cartridge", {"train.lr": -1.0}, "lr"),
        ("train_cartridge", {"start.slots": 3}, "key of start 'slots'"),
        ("train_cartridge", {"start": {"start": "zeros"}}, "start 'zeros'"),
        ("train_cartridge", {"editor": None}, "choose one"),
        ("train_cartridge", {"study": None}, "nothing to train on"),
        ("train_cartridge", {"samples.held": 1}, "key of samples 'held'"),
        ("train_cartridge", {"recall.questions": []}, "expected different questions"),
        ("train_cartridge", {"recall.path": "absent.json"}, "absent.json"),
        ("attention_matching", {"compaction.baselines": [{"editor": "knormal"}]}, "knorm"),
        ("attention_matching", {"compaction.baselines": [{"editor": "knorm", "budget": 4}] * 2},
         "already"),
        ("compose", {"parts.orchard": None}, "parts.orchard"),
        ("compose", {"parts": {}}, "two named texts"),
        ("compose", {"composition.most_orders": 1}, "most_orders"),
        ("compose", {"recall.questions": [{"question": "Why?", "document": "ferry"}]}, "part"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_before_a_model_is_loaded(recipe, change, message):
    config = composed(f"recipes={recipe}")
    for place, value in change.items():
        *path, last = place.split(".")
        section = config
        for key in path:
            section = section[key]
        section[last] = value
    with pytest.raises(KVEditError, match=message):
        plan(config)


def test_other_starts_leave_the_recipes_editor_aside():
    assert plan(composed("recipes=train_cartridge", "start=first_tokens")).editor is None


def test_a_servable_variant_needs_an_editor_that_has_one():
    config = composed("recipes=attention_matching")
    config["editor"] = {"editor": "streaming_llm", "budget": 0.5}
    with pytest.raises(KVEditError, match="fold_bias"):
        plan(config)


def test_questions_come_from_a_file(tmp_path):
    (tmp_path / "q.json").write_text('[{"question": "Why?", "answer": ["a", "b"]}]', "utf-8")
    assert read_recall(path="q.json").pairs == (("Why?", ("a", "b"), ""),)


def test_an_instruction_may_hold_the_text():
    around = read_material(text="T", instruction="<<{text}>>", role="system")
    before = read_material(text="T", instruction="Read.")
    assert (around.intro, before.intro) == ("<<{text}>>", "Read.\n\n{text}")
    assert (around.chat, before.chat) == (None, False)


def changed(recipe, **values):
    config = composed(f"recipes={recipe}")
    for place, value in values.items():
        section, _, key = place.partition("__")
        (config[section] if key else config)[key or section] = value
    return config


def test_distractors_are_references_and_texts(tmp_path):
    (tmp_path / "a.txt").write_text("The ferry sails at seven.", encoding="utf-8")
    named = ["ferry", {"ref": "ferry@{1}"}, {"path": "a.txt"}, {"text": "Lamps.", "role": None}]
    others = plan(changed("train_cartridge", distractors=named, train__distractors=0.5)).others
    assert [other.ref for other in others] == ["ferry", "ferry@{1}", None, None]
    assert others[2].material.corpus.documents[0].text == "The ferry sails at seven."
    assert [other.material.chat for other in others[2:]] == [None, False]


@pytest.mark.parametrize(
    ("distractors", "fraction", "message"),
    [
        (["ferry"], 0.0, "is 0.0 and 1 distractors are named: give both"),
        ([], 0.5, "is 0.5 and 0 distractors are named: give both"),
        ("ferry", 0.5, r"distractors: expected a list such as .* found 'ferry'"),
        ([3], 0.5, r"distractors\[0\]: expected the name of a stored memory, .* found 3"),
        ([{}], 0.5, r"distractors\[0\]: expected the name"),
        (["a", {"ref": "b", "path": "c"}], 0.5, r"distractors\[1\]: a stored memory is named by"),
        ([{"file": "a.txt"}], 0.5, r"unknown key of distractors\[0\] 'file'"),
        ([{"path": "absent.txt"}], 0.5, "absent.txt can't be read"),
    ],
    ids=str,
)
def test_bad_distractors_are_refused(distractors, fraction, message):
    config = changed("train_cartridge", distractors=distractors, train__distractors=fraction)
    with pytest.raises(KVEditError, match=message):
        plan(config)


@pytest.mark.parametrize(
    ("recipe", "values", "message"),
    [
        ("train_cartridge", {"train__lr": "fast"}, "train.lr: expected a number, found 'fast'"),
        ("train_cartridge", {"train__lr": float("nan")}, "lr: expected a finite number above 0"),
        ("train_cartridge", {"train__objective": {"mse": 1.0}}, "key of train.objective 'mse'"),
        ("train_cartridge", {"train__objective": "attention"}, "train.objective: expected keys"),
        ("train_cartridge", {"train__freeze": {"keys": 1}}, "train.freeze.keys: expected true or"),
        ("train_cartridge", {"train__steps": 2.5}, "train.steps: expected a whole number or null"),
        ("train_cartridge", {"editor__solver": "lasso"}, "solver"),
        ("train_cartridge", {"editor__keys": "omq"}, "omp"),
        ("train_cartridge", {"editor__budget": 0}, "budget: expected a ratio"),
        ("train_cartridge", {"start": {"start": "first_tokens", "slots": "8"}}, "start.slots: exp"),
        ("self_study", {"study__n": "many"}, "study.n: expected a whole number, found 'many'"),
        ("self_study", {"study__n": True}, "study.n: expected a whole number, found True"),
        ("self_study", {"study__answer": {"max_tokens": None}}, "study.answer.max_tokens: expect"),
        ("compose", {"composition__rotate": "no"}, "composition.rotate: expected true or false"),
    ],
    ids=str,
)
def test_values_of_another_type_are_refused(recipe, values, message):
    with pytest.raises(KVEditError, match=message):
        plan(changed(recipe, **values))
