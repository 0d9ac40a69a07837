"""Run-time rules as plain data: what goes in comes out, and what is malformed is named."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.memory.heads import HeadSet
from kvedit.memory.rules import GateRule, MassRule, ScaleRule, read_rules, write_rule
from kvedit.memory.span import Span

spans = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=4).map(
    lambda found: Span(tuple((start, start + size) for start, size in found))
)
heads = st.none() | st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 8)), min_size=1, max_size=6
).flatmap(lambda pairs: st.sampled_from(["query", "kv"]).map(lambda k: HeadSet.of(pairs, k)))
rules = st.one_of(
    st.builds(
        MassRule,
        spans,
        st.floats(0, 1, exclude_min=True, exclude_max=True),
        st.sampled_from(["exact", "spotlight"]),
        st.booleans(),
        heads,
    ),
    st.builds(ScaleRule, spans, st.floats(allow_nan=False, allow_infinity=False), heads),
    st.builds(
        GateRule,
        st.floats(0, 1, exclude_min=True),
        st.none() | st.lists(st.integers(0, 9), unique=True).map(tuple),
    ),
)


@given(st.lists(rules, max_size=4))
def test_rules_survive_json(found):
    plain = json.loads(json.dumps([write_rule(rule) for rule in found]))
    assert read_rules(plain) == tuple(found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MassRule(Span(((0, 1),)), 0.0), "target"),
        (lambda: MassRule(Span(((0, 1),)), 1.0), "target"),
        (lambda: MassRule(Span(((0, 1),)), math.nan), "target"),
        (lambda: MassRule(Span(((0, 1),)), 1), "target"),
        (lambda: MassRule(Span(((0, 1),)), 0.5, form="soft"), "form"),
        (lambda: ScaleRule(Span(((0, 1),)), math.inf), "factor"),
        (lambda: GateRule(0.0), "beta"),
        (lambda: GateRule(1.5), "beta"),
    ],
)
def test_ranges_are_checked(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({"rule": "lift", "version": 1}, UnsupportedModel, "'lift'.*knows mass, scale, gate"),
        ({"rule": "mass", "version": 2}, UnsupportedModel, "version 2"),
        ("mass", InvalidArgument, "a mapping"),
        ({"rule": "operand", "kind": "queries"}, UnsupportedModel, "operand of editors"),
        ({"rule": "mass", "version": 1, "target": 0.5}, InvalidArgument, "malformed"),
        ({"rule": "gate", "version": 1, "beta": 0.5, "code": "x"}, InvalidArgument, "malformed"),
        (
            {"rule": "mass", "version": 1, "span": {"ranges": [[0, 1]]}, "target": 0.5},
            InvalidArgument,
            "unit",
        ),
    ],
)
def test_what_is_not_known_or_malformed_is_named(rule, error, message):
    with pytest.raises(error, match=message):
        read_rules([rule])


def test_a_written_rule_is_plain_data():
    rule = MassRule(Span(((1, 2), (5, 9))), 0.3, heads=HeadSet.of({0: [1, 2]}))
    assert write_rule(rule) == {
        "rule": "mass",
        "version": 1,
        "span": {"ranges": [[1, 2], [5, 9]], "unit": "token"},
        "target": 0.3,
        "form": "exact",
        "raise_only": True,
        "heads": {"heads": {"0": [1, 2]}, "kind": "query"},
    }
    assert not any(isinstance(value, torch.Tensor) for value in write_rule(rule).values())
