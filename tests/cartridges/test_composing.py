"""Compositions: which orders there are, and where sinks end up."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.cartridges import compose, orders, sink_positions
from kvedit.errors import InvalidArgument


def test_orders_are_different_and_the_natural_one_comes_first():
    found = orders(3, 10, seed=1)
    assert found[0] == (0, 1, 2)
    assert len(set(found)) == len(found) == 6
    some = orders(4, 5, seed=1)
    assert len(set(some)) == 5
    assert some == orders(4, 5, seed=1) != orders(4, 5, seed=2)
    many = orders(9, 4)
    assert len(set(many)) == 4
    assert all(sorted(one) == list(range(9)) for one in many)
    assert orders(1, 3) == [(0,)]
    with pytest.raises(InvalidArgument, match="at least 1"):
        orders(0, 3)


def test_sinks_are_found_where_their_parts_stand(subject):
    found = subject()
    texts = ("Keep the receipt.", "No.", "You would wait.")
    parts = [kv.capture(found.model, found.tokenizer, text) for text in texts]
    whole = compose(parts)
    places = sink_positions(parts, 2)
    for part, start in zip(parts, (0, len(parts[0].tokens), whole.next_position), strict=False):
        at = [
            i for i, p in enumerate(whole.layers[0].positions.tolist()) if p in (start, start + 1)
        ]
        assert set(whole.layers[0].positions[at].tolist()) <= set(places)
        assert torch.equal(whole.layers[0].values[:, at], part.layers[0].values[:, :2])
        if start:
            break
    assert len(places) == 6
    assert sink_positions(parts, rotate=False) == (0,)


def test_the_order_moves_keys_and_leaves_values(subject):
    found = subject()
    parts = [kv.capture(found.model, found.tokenizer, text) for text in ("Keep it.", "Wait now.")]
    natural, turned = compose(parts), compose(parts, order=(1, 0))
    first = parts[1].layers[0]
    assert torch.equal(turned.layers[0].values[:, : first.slots], first.values)
    assert torch.equal(turned.layers[0].keys[:, : first.slots], first.keys)
    assert not torch.equal(natural.layers[0].keys[:, -first.slots :], first.keys)
    assert natural.next_position == turned.next_position
