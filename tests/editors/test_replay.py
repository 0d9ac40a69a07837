"""Replay: a memory comes again from its lineage, bit by bit, or one error says why not."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import REGISTRY, Drop, Emphasize, Shift, Suppress, build
from kvedit.editors.base import Editor
from kvedit.editors.replaying import compare_replay, rebuild, replay
from kvedit.editors.replaying.plan import make_plan
from kvedit.errors import ContextTooLong, IncompatibleModel, InvalidArgument, KVEditError, NotFound
from kvedit.memory import KVMemory, Lineage, LineageNode
from kvedit.memory.digest import canonical_json
from kvedit.registry import Registry
from kvedit.runtime import ModelReader
from kvedit.runtime.recapture import recapturer
from kvedit.testing import CONTEXT, EDITOR_CASES, EditorCase, make_test_operand

FAMILIES = ("llama", "gemma3", "qwen3")
NEAR = {"tokens": [-6, -2]}
CHAT = [
    {"role": "system", "content": "The refund window is 60 days."},
    {"role": "user", "content": "How long do I have?"},
]


def by_head(*memories: KVMemory) -> dict[str, KVMemory]:
    return {memory.lineage.head.id: memory for memory in memories if memory.lineage.head}


def stored_in(memories: dict[str, KVMemory]) -> Any:
    def fetch(name: str) -> KVMemory:
        if name not in memories:
            raise NotFound(name)
        return memories[name]

    return fetch


def assert_same(stored: KVMemory, again: KVMemory) -> None:
    report = compare_replay(stored, again)
    assert report.bit_equal and report.digest_equal and report.lineage_equal, report
    assert not any(found.max_abs for found in report.deviations.values())


def changed(memory: KVMemory, **fields: Any) -> Lineage:
    """The memory's lineage with other fields of its head."""
    *before, head = memory.lineage.nodes
    return Lineage((*before, dataclasses.replace(head, **fields)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", EDITOR_CASES, ids=lambda case: case.name)
def test_every_editor_comes_again(case: EditorCase, family: str, subject: Any) -> None:
    found, editor = subject(family), case.build()
    edited = found.apply(editor)
    operands = [make_test_operand(k, found.model, found.tokenizer) for k in editor.operands]
    given = by_head(found.memory, *operands)
    reader = ModelReader(found.model, found.tokenizer)
    assert_same(edited, replay(edited, given, reader=reader))
    assert_same(edited, replay(edited.lineage, given.get, reader=reader))


def test_it_is_computed_and_not_looked_up(subject: Any) -> None:
    memory = subject("llama").memory
    edited = Drop(NEAR)(memory)
    asked: list[str] = []

    def lookup(name: str) -> KVMemory | None:
        asked.append(name)
        return {**by_head(memory), **by_head(edited)}.get(name)

    again = replay(edited, lookup)
    assert asked == [memory.lineage.head.id]
    assert again.layers[0].keys.data_ptr() != edited.layers[0].keys.data_ptr()


def test_of_two_steps_only_those_behind_the_stored_memory_are_repeated(subject: Any) -> None:
    memory = subject("gemma3").memory
    first = Emphasize("That is", strength=1.0)(memory)
    second = Drop(NEAR, layers=(0, -1))(first)
    assert_same(second, replay(second, by_head(memory)))
    branch = Shift(3)(first)
    found = by_head(first)
    assert_same(branch, replay(branch, found))
    assert_same(second, replay(second, found))


def test_a_memory_without_history_is_named_by_its_content(subject: Any) -> None:
    bare = dataclasses.replace(subject("qwen3").memory, lineage=Lineage())
    edited = Suppress(NEAR, strength=2.0)(bare)
    assert_same(edited, replay(edited, {bare.digest: bare}))
    with pytest.raises(NotFound, match="no step of its own"):
        replay(edited)


@dataclasses.dataclass(frozen=True)
class Sum(Editor):
    """Of the biases of two memories."""

    def check_inputs(self, memories: tuple[KVMemory, ...]) -> None:
        assert len(memories) == 2

    def edit(self, *memories: KVMemory, reader: Any = None) -> KVMemory:
        a, b = memories
        return a.with_layers({i: a.layers[i].add_bias(b.layers[i].bias) for i in a.layers})


def test_two_inputs_that_share_a_step(subject: Any, monkeypatch: Any) -> None:
    module = types.ModuleType("replay_test_sum")
    module.Sum = Sum
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registry = Registry("editor", {**REGISTRY.targets, "sum": "replay_test_sum:Sum"})
    monkeypatch.setattr("kvedit.editors.REGISTRY", registry)
    monkeypatch.setattr("kvedit.editors.replaying.steps.REGISTRY", registry)
    memory = subject("llama").memory
    left = Emphasize("That is", strength=1.0)(memory)
    right = Suppress("That is", strength=1.0)(memory)
    both = Sum()(left, right)
    assert_same(both, replay(both, by_head(memory)))
    assert_same(both, replay(both, by_head(left, memory)))
    twice = Sum()(left, left)
    assert_same(twice, replay(twice, by_head(memory)))


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_an_approximation_comes_again(codec: str, subject: Any) -> None:
    from kvedit.store.codecs import approximate

    memory = subject("llama", torch.float32).memory
    rough, _ = approximate(Emphasize("That is", strength=1.0)(memory), codec)
    assert rough.lineage.head.name == "codec"
    assert_same(rough, replay(rough, by_head(memory)))
    assert_same(rough, rebuild(rough.lineage, stored_in(by_head(memory))))
    other = changed(rough, parameters='{"codec":"pickle"}')
    with pytest.raises(KVEditError, match="pickle"):
        replay(other, by_head(memory))


def test_a_cast_between_steps_leaves_no_step_and_is_repeated(subject: Any) -> None:
    memory = subject("llama", torch.float32).memory
    edited = Shift(5)(memory.to(dtype=torch.bfloat16))
    assert_same(edited, replay(edited, by_head(memory)))
    wide = Shift(5)(memory).to(dtype=torch.float16)
    assert_same(wide, replay(wide, by_head(memory)))
    assert replay(wide.lineage, by_head(memory)).dtype == torch.float32


# --- what ran a model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"chunk": 7}, {"layers": [0, -1]}, {"window": "windowed"}],
    ids=lambda found: "-".join(map(str, found)) or "plain",
)
def test_a_capture_comes_again(family: str, options: dict[str, Any], subject: Any) -> None:
    found = subject(family, torch.float32)
    stored = kv.capture(found.model, found.tokenizer, CONTEXT, **options)
    capture = recapturer(found.model, found.tokenizer, stored.source, options.get("chunk"))
    assert_same(stored, replay(stored, capture=capture))


def test_pieces_that_the_node_notes_are_used(subject: Any) -> None:
    found = subject("llama", torch.float32)
    stored = kv.capture(found.model, found.tokenizer, CONTEXT, chunk=7)
    capture = recapturer(found.model, found.tokenizer, stored.source)
    node = stored.lineage.head
    noted = dict([*node.environment, ("chunk", "7")])
    lineage = changed(stored, environment=tuple(sorted(noted.items())))
    assert compare_replay(stored, replay(lineage, capture=capture)).bit_equal
    whole = recapturer(found.model, found.tokenizer, stored.source, 4096)
    report = compare_replay(stored, replay(stored, capture=whole))
    assert not report.bit_equal
    assert 0 < report.deviations["keys"].max_abs < 1e-4


def test_a_chat_and_its_edit_come_again(subject: Any) -> None:
    found = subject("qwen3", torch.float32)
    stored = Emphasize({"role": "system"}, strength=1.0)(
        kv.capture(found.model, found.tokenizer, CHAT)
    )
    capture = recapturer(found.model, found.tokenizer, stored.source)
    assert_same(stored, replay(stored, capture=capture))


@pytest.mark.parametrize("context", [CONTEXT, CHAT], ids=["text", "chat"])
def test_a_grown_session_comes_again_up_to_rounding(context: Any, subject: Any) -> None:
    found = subject("llama", torch.float32)
    edited = Emphasize({"tokens": [2, 5]}, strength=1.0)(
        kv.capture(found.model, found.tokenizer, context)
    )
    with kv.attach(found.model, edited, found.tokenizer) as session:
        session.generate("and you would wait", max_new_tokens=5)
        grown = session.memory()
    stored = Drop({"tokens": [0, 2]})(grown)
    capture = recapturer(found.model, found.tokenizer, stored.source)
    again = replay(stored, capture=capture)
    report = compare_replay(stored, again)
    assert report.lineage_equal
    assert (report.reproducibility, report.weakest) == ("pure", "reader")
    assert report.deviations["keys"].max_abs < 1e-4
    assert torch.equal(stored.tokens, again.tokens)
    assert_same(stored, replay(stored, by_head(grown)))


def test_the_wrong_source_or_model_is_refused(subject: Any) -> None:
    found, other = subject("llama", torch.float32), subject("qwen3", torch.float32)
    stored = found.memory
    elsewhere = kv.capture(found.model, found.tokenizer, "Another text.").source
    with pytest.raises(InvalidArgument, match="does not hold"):
        replay(stored, capture=recapturer(found.model, found.tokenizer, elsewhere))
    with pytest.raises(IncompatibleModel, match="load that model"):
        replay(stored, capture=recapturer(other.model, other.tokenizer, stored.source))


def test_what_ran_elsewhere_is_reported(subject: Any) -> None:
    found = subject("llama", torch.float32)
    stored = Shift(4)(found.memory)
    torch.set_num_threads(2)
    try:
        again = replay(stored, by_head(found.memory))
    finally:
        torch.set_num_threads(1)
    report = compare_replay(stored, again)
    assert report.environment == (("edit shift", "threads", "1", "2"),)
    assert "threads 1 -> 2" in repr(report)
    half = compare_replay(stored, Shift(4)(found.memory.to(dtype=torch.bfloat16)))
    assert ("edit shift", "dtype", "float32", "bfloat16") in half.environment
    assert not half.bit_equal and not half.digest_equal and half.lineage_equal
    assert 0 < half.deviations["keys"].relative < 1e-2


def test_a_report_tells_where_two_memories_differ(subject: Any) -> None:
    memory = subject("llama").memory
    report = compare_replay(memory, Drop(NEAR, layers=(1,))(memory))
    assert report.deviations["keys"].max_abs == float("inf")
    evicted = compare_replay(memory, Suppress(NEAR, strength="inf")(memory))
    assert evicted.deviations["bias"].max_abs == float("inf")
    assert evicted.deviations["keys"].max_abs == 0
    assert not evicted.bit_equal and not evicted.lineage_equal
    named = compare_replay(memory, dataclasses.replace(memory, next_position=999))
    assert not named.bit_equal and not named.digest_equal


# --- recipes


def test_a_recipe_is_rebuilt_from_the_nearest_stored_memory(subject: Any) -> None:
    memory = subject("llama").memory
    first = Emphasize("That is", strength=1.0)(memory)
    second = Shift(2)(first)
    asked: list[str] = []

    def fetch(name: str) -> KVMemory:
        asked.append(name)
        if name != first.lineage.head.id:
            raise NotFound(name)
        return first

    assert rebuild(second.lineage, fetch).digest == second.digest
    assert asked == [first.lineage.head.id]


def test_a_recipe_runs_no_model(subject: Any) -> None:
    edited = Drop(NEAR)(subject("llama").memory)

    def nothing(name: str) -> KVMemory:
        raise NotFound(name)

    with pytest.raises(NotFound, match=r"capture.*ran a model"):
        rebuild(edited.lineage, nothing)
    trained = changed(edited, reproducibility="trained")
    base = by_head(subject("llama").memory)
    with pytest.raises(NotFound, match=r"drop.*'trained'"):
        rebuild(trained, stored_in(base))


# --- refusals


def test_a_missing_step_is_named_with_what_to_pass(subject: Any) -> None:
    memory = subject("llama").memory
    edited = Drop(NEAR)(memory)
    with pytest.raises(NotFound, match=rf"capture.*inputs under {memory.lineage.head.id}"):
        replay(edited)


def test_another_version_is_refused(subject: Any, monkeypatch: Any) -> None:
    memory = subject("llama").memory
    edited = Drop(NEAR)(memory)
    chain = build("chain", editors=[{"editor": "chain", "editors": [Drop(NEAR)]}])(memory)
    monkeypatch.setattr(Drop, "version", 2)
    for stored in (edited, chain):
        with pytest.raises(InvalidArgument, match="was version 1, here it is version 2"):
            replay(stored, by_head(memory))
    # Inside of another editor the version stands beside the name.
    noted = json.loads(chain.lineage.head.parameters)
    noted["editors"][0]["editors"][0]["version"] = 2
    lineage = changed(chain, parameters=canonical_json(noted).decode())
    assert replay(lineage, by_head(memory)).digest == chain.digest


def test_fields_that_an_editor_got_since_do_not_count(subject: Any) -> None:
    memory = subject("llama").memory
    edited = Emphasize(NEAR, strength=1.0)(memory)
    fewer = json.loads(edited.lineage.head.parameters)
    del fewer["reference"], fewer["kv_heads"]
    lineage = changed(edited, parameters=canonical_json(fewer).decode())
    again = replay(lineage, by_head(memory))
    assert again.digest == edited.digest
    assert again.lineage.head.id == lineage.head.id


def test_an_input_that_is_another_memory_is_refused(subject: Any) -> None:
    memory = subject("llama").memory
    edited = Drop(NEAR)(memory)
    with pytest.raises(InvalidArgument, match="asked for the memory"):
        replay(edited, {memory.lineage.head.id: edited})


DEEP = '{"editors":[' + '{"editor":"chain","editors":[' * 3000 + "]}" * 3000 + "]}"
HOSTILE = {
    "unknown-editor": {"name": "os:system"},
    "module": {"name": "antigravity"},
    "name-type": {"name": ["drop"]},
    "not-json": {"parameters": "drop"},
    "list": {"parameters": "[]"},
    "number": {"parameters": "3"},
    "nan": {"parameters": '{"span":NaN}'},
    "twice": {"parameters": '{"span":"a","span":"That is"}'},
    "spaces": {"parameters": '{"span": "That is"}'},
    "unknown-field": {"parameters": '{"path":"/etc/passwd","span":"a"}'},
    "editor-field": {"parameters": '{"editor":"drop","span":"a"}'},
    "no-span": {"parameters": "{}"},
    "span-type": {"parameters": '{"span":[1,2]}'},
    "layers-type": {"parameters": '{"layers":{"a":1},"span":"a"}'},
    "other-spelling": {"parameters": '{"span":"That is"}'},  # a query is written as a mapping
    "chain-name": {"name": "chain", "parameters": '{"editors":[{"editor":["drop"]}]}'},
    "chain-unknown": {"name": "chain", "parameters": '{"editors":[{"editor":"eval"}]}'},
    "chain-text": {"name": "chain", "parameters": '{"editors":"drop"}'},
    "chain-deep": {"name": "chain", "parameters": DEEP},
    "shift-far": {"name": "shift", "parameters": '{"offset":' + "9" * 30 + "}"},
    "shift-bool": {"name": "shift", "parameters": '{"offset":true}'},
    "long": {"parameters": '{"span":"' + "a" * (1 << 20) + '"}'},
    "surrogate": {"name": "\ud800"},
    "version-type": {"version": "1"},
    "class": {"reproducibility": "reader"},
    "class-unknown": {"reproducibility": "magic"},
    "operation": {"operation": "exec"},
    "import": {"operation": "import"},
    "seed": {"seed": 7},
    "seed-type": {"seed": 0.5},
    "no-inputs": {"inputs": ()},
    "input-type": {"inputs": (5,)},
    "input-unknown": {"inputs": ("0" * 64,)},
    "dtype": {"environment": (("dtype", "__class__"),)},
    "environment": {"environment": ((1, 2),)},
}  # fmt: skip


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_step_is_one_error_and_no_import(fields: dict[str, Any], subject: Any) -> None:
    memory = subject("llama").memory
    edited = Drop("That is")(memory)
    lineage = changed(edited, **fields)
    replay(edited, by_head(memory))  # what this needs is imported now, and so are all editors
    assert all(map(REGISTRY.load, REGISTRY))
    known = set(sys.modules)
    for again in (replay, lambda lin, inputs: rebuild(lin, stored_in(inputs))):
        with pytest.raises(KVEditError) as caught:
            again(lineage, by_head(memory))
        assert isinstance(caught.value, InvalidArgument | NotFound | ContextTooLong)
        assert len(str(caught.value)) < 2000
    assert set(sys.modules) - known == set()


class Named(LineageNode):
    """A step whose id is what its name says, so that circles can be made."""

    @property
    def id(self) -> str:
        return self.name


def test_an_editor_of_one_memory_gets_one(subject: Any) -> None:
    memory = subject("llama").memory
    edited = Drop(NEAR)(memory)
    lineage = changed(edited, inputs=edited.lineage.head.inputs * 2)
    with pytest.raises(InvalidArgument, match="edits one KVMemory"):
        replay(lineage, by_head(memory))


def test_a_circle_ends() -> None:
    nodes = [Named("edit", name, 1, "{}", (behind,)) for name, behind in ("ab", "bc", "ca")]
    with pytest.raises(InvalidArgument, match="input of itself"):
        replay(Lineage(tuple(nodes)))


def test_a_lineage_has_steps_and_an_end(subject: Any) -> None:
    with pytest.raises(InvalidArgument, match="1 to 20000 steps, found 0"):
        replay(Lineage())
    node = subject("llama").memory.lineage.head
    with pytest.raises(InvalidArgument, match="found 20001"):
        replay(Lineage((node,) * 20_001))


def test_a_long_lineage_is_walked_without_recursion() -> None:
    nodes: list[LineageNode] = []
    for step in range(3000):
        behind = (nodes[-1].id,) if nodes else ()
        nodes.append(LineageNode("edit", "shift", 1, f'{{"offset":{step}}}', behind))
    plan = make_plan(Lineage(tuple(nodes)), {}.get)
    assert list(plan.steps.values()) == nodes


def test_steps_in_another_order_are_found(subject: Any) -> None:
    memory = subject("llama").memory
    stored = Shift(1)(Drop(NEAR)(Emphasize("That is", strength=1.0)(memory)))
    *before, head = stored.lineage.nodes
    mixed = Lineage((*reversed(before), head))
    assert replay(mixed, by_head(memory)).digest == stored.digest
