"""RecallReport and Size: means, differences, groups and sizes, worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import kvedit as kv
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals.answering import TaskResult
from kvedit.evals.recall import RecallQuestion, RecallReport, Size
from kvedit.testing import CONTEXT, tiny_model

SIZES = {"full": Size(8, 8, 8.0, 800, 1.0, 1.0), "small@4": Size(8, 2, 2.0, 200, 4.0, 4.0)}


def report(document: str = "a", kl: tuple[float, ...] = (1.0, 3.0, 2.0), **facts) -> RecallReport:
    questions = tuple(
        RecallQuestion(f"{i}?", ("x",), document=document, facts=(("odd", i % 2),))
        for i in range(len(kl))
    )
    results = {
        name: tuple(
            TaskResult(q.key, (("f1", scale), ("kl", scale * value)), f"{name}")
            for q, value in zip(questions, kl, strict=True)
        )
        for name, scale in (("full", 0.0), ("small@4", 1.0))
    }
    # The last question of the small memory lacks a metric.
    last = results["small@4"][-1]
    short = (*results["small@4"][:-1], dataclasses.replace(last, scores=last.scores[1:]))
    return RecallReport(questions, {**results, "small@4": short}, SIZES, baseline="full", **facts)


def test_means_and_differences_are_over_questions() -> None:
    found = report()
    assert found.metrics == ("kl", "f1")  # in the order of METRICS
    assert found.mean("small@4", "kl").value == 2
    assert found.mean("small@4", "f1").n == 2
    assert found.by("small@4", "odd", "kl")[0].value == 1.5
    assert found.by("small@4", "document", "kl")["a"].value == 2
    difference = found.difference("small@4", metric="kl")
    assert (difference.value, difference.n) == (2, 3)
    assert difference.low >= 1 and difference.high <= 3
    assert found.difference("full", "small@4", "kl").value == -2


def test_the_interval_is_a_bootstrap_over_questions() -> None:
    values = tuple(float(i % 7) for i in range(200))
    found = report(kl=values).mean("small@4", "kl")
    spread = torch.tensor(values).std() / math.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(spread), rel=0.1)


def test_it_is_plain_data() -> None:
    data = json.loads(json.dumps(report().to_json()))
    small = data["memories"]["small@4"]
    assert small["size"]["ratio"] == 4 and small["metrics"]["kl"]["value"] == 2
    assert small["differences"]["kl"]["value"] == 2
    assert "differences" not in data["memories"]["full"] and "results" not in small
    assert report().to_json(results=True)["memories"]["full"]["results"][0]["answer"] == "full"


def test_the_table_has_a_line_per_memory() -> None:
    lines = repr(report()).splitlines()
    assert "n=3" in lines[0]
    assert lines[1].split() == ["memory", "tokens", "slots", "kept", "MB", "ratio", "kl", "f1"]
    assert lines[3].startswith("small@4") and "4x" in lines[3] and "2 [1, 3]" in lines[3]
    assert "(n=2)" in lines[3]
    marked = report().table(["kl"], markdown=True).splitlines()
    assert len(marked) == 4 and all(line.count("|") == 8 for line in marked)


def test_reports_of_documents_join() -> None:
    one, two = report("a"), report("b", kl=(5.0, 5.0))
    whole = RecallReport.join([one, two])
    assert whole.n == 5
    assert whole.mean("small@4", "kl").value == pytest.approx((6 + 10) / 5)
    assert whole.sizes["small@4"] == SIZES["small@4"]
    assert "2 documents" in repr(whole)
    for wrong, message in (
        ([], "none"),
        ([one, one], "share questions"),
        ([one, report("b", seed=1)], "seed"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            RecallReport.join(wrong)


def test_unknown_names_are_errors() -> None:
    for call in (
        lambda: report().mean("absent", "kl"),
        lambda: report().mean("full", "k"),
        lambda: report().table(["k"]),
        lambda: dataclasses.replace(report(), baseline="absent"),
    ):
        with pytest.raises(UnknownName):
            call()
    with pytest.raises(InvalidArgument, match="baseline"):
        dataclasses.replace(report(), baseline=None).difference("full")


def test_hidden_slots_are_bytes_and_no_length() -> None:
    model, tokenizer = tiny_model("llama")  # 4 query heads, 2 KV heads
    full = kv.capture(model, tokenizer, CONTEXT)
    bias = torch.zeros(4, full.slots)
    bias[0:2, :10] = -torch.inf  # both query heads of KV head 0
    bias[2, :30] = -torch.inf  # one of the two of KV head 1: its slots are still seen
    layers = {i: dataclasses.replace(layer, bias=bias) for i, layer in full.layers.items()}
    size = Size.of(full.with_layers(layers), full)
    assert size.kept == full.slots - 5  # the mean of -10 and -0
    assert size.ratio == pytest.approx(full.slots / (full.slots - 5))
    assert size.slots == full.slots and size.nbytes == full.nbytes + 3 * bias.nbytes
    assert size.byte_ratio < 1
    short = kv.editors.Keep({"tokens": [0, 9]})(full)
    assert Size.of(short, full).ratio == pytest.approx(full.slots / 9)
    assert Size.of(short, full).byte_ratio == pytest.approx(full.slots / 9)
    assert Size.of(None, full) == Size(0, 0, 0, 0, None, None)
