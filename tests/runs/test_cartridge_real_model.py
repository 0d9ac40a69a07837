"""The recipe train_cartridge on the packaged model, in this process: a few samples and steps."""

import json

import pytest
import torch
from hydra import compose, initialize_config_module

from kvedit.runs.pipelines import run
from kvedit.runs.run import plain, recipes_folder
from kvedit.store import Store

TEXT = (
    "The shop of Ada Brunner sells lamps. A lamp can be returned within 60 days. Repairs take nine "
    "days and cost 14 coins. The shop is closed on Mondays. Letters go to Hafen Street 5."
)
QUESTIONS = [
    {"question": "When can a lamp be returned?", "answer": "60 days"},
    {"question": "When is the shop closed?", "answer": "Mondays"},
]
OPTIONS = (
    "recipes=train_cartridge", f"document.text='{TEXT}'", "tracker=jsonl", "reuse.enabled=false",
    "study.n=8", "study.chunking.min_tokens=40", "study.question.max_tokens=16",
    "study.answer.max_tokens=16", "samples.held_out=0.25", "editor.budget=0.25",
    "train.steps=6", "train.warmup=1", "train.eval_every=3", "recall.max_new_tokens=8",
)  # fmt: skip


@pytest.mark.slow
def test_held_out_kl_falls_in_a_few_steps(smollm, tmp_path, monkeypatch):
    monkeypatch.setenv("KVEDIT_RECIPES", str(recipes_folder()))
    monkeypatch.setattr("kvedit.models.loading.load", lambda name, **_: smollm)
    with initialize_config_module("kvedit.conf", version_base="1.3"):
        composed = compose("run", overrides=[*OPTIONS, f"store.path={tmp_path / 'store'}"])
    config = plain(composed) | {"recall": {**plain(composed)["recall"], "questions": QUESTIONS}}
    before = torch.get_num_threads()
    try:
        report = run(config, tmp_path / "out", say=lambda line: None)
    finally:
        torch.set_num_threads(before)
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    facts = results["facts"]
    assert facts["held-out kl best"] < facts["held-out kl before"]
    assert facts["samples"] + facts["samples held out"] == 8
    names = ["full", "no context", "truncation", "start", "trained"]
    assert list(report.recall.names) == names
    kl = {name: report.recall.mean(name, "kl").value for name in names}
    assert kl["trained"] < kl["no context"]
    with Store(tmp_path / "store") as store:
        memory, (entry, *_) = store.get("train_cartridge"), store.log("train_cartridge")
    assert [node.name for node in memory.lineage.nodes][-2:] == ["attention_matching", "train"]
    assert entry.metrics["recall/kl"] == pytest.approx(kl["trained"])
