"""What is written as JSON comes back equal: model facts, lineage, source."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvedit.memory import (
    ChatState,
    Fingerprint,
    Lineage,
    LineageNode,
    Message,
    ModelSpec,
    RopeSpec,
    Source,
)
from kvedit.memory.digest import canonical_json
from kvedit.models.inspection import inspect
from kvedit.testing import tiny_model


def through_json(data: Any) -> Any:
    return json.loads(canonical_json(data))


@pytest.mark.parametrize("family", ["llama", "gemma3", "cohere2", "gpt_oss", "gpt2", "gemma2"])
def test_model_spec(family: str) -> None:
    spec = inspect(tiny_model(family)[0]).spec
    again = ModelSpec.from_json(through_json(spec.to_json()))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.identity() == spec.identity()
    assert "name" not in spec.identity()


def test_equal_rotations_are_written_once(make: Any) -> None:
    spec = make.spec()
    data = spec.to_json()
    assert len(data["ropes"]) == 1
    assert [layer["rope"] for layer in data["layers"]] == [0, None, 0]
    assert spec.layers[0].rope.rotated == 8
    assert spec.bytes_per_token(2) == 3 * 2 * 2 * (8 + 6)


@given(st.lists(st.floats(2**-30, 1.0, width=32), min_size=1, max_size=6))
def test_frequencies_keep_every_bit(make: Any, frequencies: list[float]) -> None:
    rope = RopeSpec("yarn", tuple(frequencies), 1.1386294364929199, "interleaved", switch=64)
    layer = dataclasses.replace(make.spec().layers[0], rope=rope)
    spec = dataclasses.replace(make.spec(), layers=(layer,))
    assert ModelSpec.from_json(through_json(spec.to_json())).layers[0].rope == rope


def test_lineage_nodes() -> None:
    node = LineageNode(
        "edit",
        "emphasize",
        2,
        '{"strength":2.5,"text":"naïve 🙂"}',
        inputs=("a", "b"),
        reproducibility="reader",
        seed=7,
        environment=(("dtype", "float32"), ("torch", "2")),
    )
    again = LineageNode.from_json(through_json(node.to_json()))
    assert again == node
    assert again.id == node.id
    elsewhere = dataclasses.replace(node, environment=(("torch", "3"),))
    assert elsewhere.id == node.id
    assert elsewhere != node


@pytest.mark.parametrize(
    "changed",
    [
        {"operation": "grow"},
        {"name": "drop"},
        {"version": 2},
        {"parameters": '{"a":1}'},
        {"inputs": ("a",)},
        {"reproducibility": "trained"},
        {"seed": 0},
    ],
    ids=str,
)
def test_what_was_done_is_the_id(changed: dict[str, Any]) -> None:
    node = LineageNode("edit", "keep", 1, "{}")
    assert dataclasses.replace(node, **changed).id != node.id


def test_lineages_join_without_repeating_steps() -> None:
    root = LineageNode("capture", "capture", 1, "{}")
    left = LineageNode("edit", "drop", 1, "{}", (root.id,))
    right = LineageNode("edit", "keep", 1, "{}", (root.id,))
    merged = LineageNode("edit", "concat", 1, "{}", (left.id, right.id))
    joined = Lineage.join([Lineage((root, left)), Lineage((root, right))], merged)
    assert joined.nodes == (root, left, right, merged)
    assert joined.head == merged
    for at, node in enumerate(joined.nodes):
        assert set(node.inputs) <= {earlier.id for earlier in joined.nodes[:at]}
    assert Lineage().head is None
    shown = joined.describe().splitlines()
    assert [line.split()[2] for line in shown] == ["concat", "keep", "drop", "capture"]


@pytest.mark.parametrize("chat", [None, ChatState("digest", 12)])
def test_source(chat: ChatState | None, make: Any) -> None:
    messages = (Message("user", "The 🙂 box", 0, 9), Message("tool", "lost"))
    source = dataclasses.replace(make.source("The 🙂 box\x00\u202e"), messages=messages, chat=chat)
    again = Source.from_json(through_json(source.to_json()), source.tokens, source.offsets)
    assert (again.text, again.messages, again.chat) == (source.text, messages, chat)
    assert torch.equal(again.offsets, source.offsets)


def test_fingerprints_say_what_differs() -> None:
    one = Fingerprint("c", "w", "t", "a")
    assert one.differences(one) == {}
    other = dataclasses.replace(one, weights="v", adapters="")
    assert one.differences(other) == {"weights": ("w", "v"), "adapters": ("a", "")}
    assert one.differences(dataclasses.replace(one, tokenizer="")) == {}  # unknown fits all
    assert set(one.differences(dataclasses.replace(one, tokenizer="u"))) == {"tokenizer"}


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.0], "a": "é"}) == '{"a":"é","b":[1,2.0]}'.encode()
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
