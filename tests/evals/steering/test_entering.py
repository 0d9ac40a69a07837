"""Ways into steering: managers anew each time, edits once a memory."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

import kvedit as kv
from kvedit.errors import InvalidArgument
from kvedit.evals.steering.entering import Entry


def test_a_manager_is_made_anew_and_left_after_an_error() -> None:
    log: list[str] = []

    @contextmanager
    def manager():
        log.append("in")
        try:
            yield
        finally:
            log.append("out")

    entry = Entry(manager)
    assert log == []
    for _ in range(2):
        with entry.on() as change:
            assert change(None) is None
    with pytest.raises(RuntimeError), entry.on():
        raise RuntimeError
    assert log == ["in", "out"] * 3


def test_edits_are_made_once_a_memory(tiny) -> None:
    memories = [kv.capture(*tiny, text) for text in ("The thing", "The box")]
    made: list[object] = []

    def edit(memory):
        made.append(memory)
        return kv.editors.Shift(3)(memory)

    entry = Entry(lambda: edit)
    with entry.on() as change:
        first = change(memories[0])
        assert change(memories[0]) is first and first.next_position > memories[0].next_position
    with entry.on() as change:
        assert change(memories[0]) is first
        change(memories[1])
        with pytest.raises(InvalidArgument, match='hold="prompt"'):
            change(None)
    assert made == memories
    with Entry(lambda: memories[1]).on() as change:
        assert change(None) is change(memories[0]) is memories[1]
    with Entry().on() as change:
        assert change(memories[0]) is memories[0]
    with pytest.raises(InvalidArgument, match="found int"), Entry(lambda: 3).on():
        pass
