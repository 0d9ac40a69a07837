"""The recipe cache_steering on the packaged model: a small run, with its second process."""

import json

import pytest
import torch
from hydra import compose, initialize_config_module

from kvedit.runs.pipelines import run
from kvedit.runs.run import plain, recipes_folder
from kvedit.store import Store

OPTIONS = (
    "recipes=cache_steering", "contrast.pairs=6", "contrast.shots=2", "style.questions=3",
    "style.bystanders=2", "style.max_new_tokens=16", "style.bystander_tokens=8", "style.again=1",
    "style.examples=1", "tracker=none",
)  # fmt: skip


@pytest.mark.slow
def test_steered_questions_open_with_the_style(smollm, tmp_path, monkeypatch):
    monkeypatch.setenv("KVEDIT_RECIPES", str(recipes_folder()))
    monkeypatch.setattr("kvedit.models.loading.load", lambda name, **_: smollm)
    with initialize_config_module("kvedit.conf", version_base="1.3"):
        words = [*OPTIONS, f"store.path={tmp_path / 'store'}"]
        config = plain(compose("run", overrides=words))
    before = torch.get_num_threads()
    try:
        report = run(config, tmp_path / "out", say=lambda line: None)
    finally:
        torch.set_num_threads(before)
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    opening = {name: report.style.mean(name, "opening").value for name in report.style.names}
    # "First" becomes likelier by more than a nat, and not by whatever is added.
    assert opening["steered"] > opening["none"] + 1
    assert opening["steered"] > opening["random 0"] + 1
    assert results["bit_equal"] is True
    with Store(tmp_path / "store") as store:
        memory = store.get("cache_steering")
    assert memory.servable()
    assert memory.lineage.head.name == "steer"
