"""The line: first come, first served, no more than may wait, and nobody left behind."""

import asyncio
import threading
import time

import pytest

from kvedit.serving.openai.events import Failed, Piece
from kvedit.serving.openai.problems import Refusal
from kvedit.serving.openai.queueing import Line


def waits_for(gate, name):
    def work(ticket):
        gate.wait(10)
        ticket.say(Piece(name, None))

    return work


def heard(line, run):
    before = threading.active_count()
    try:
        asyncio.run(asyncio.wait_for(run(), 20))
    finally:
        line.close()
    assert threading.active_count() == before


def test_the_first_come_is_first_served_and_no_more_than_fit():
    line, gate = Line(3), threading.Event()

    async def run():
        tickets = line.enter([waits_for(gate, "a")])
        tickets += line.enter([waits_for(gate, "b"), waits_for(gate, "c")])
        tickets += line.enter([waits_for(gate, "d")])
        with pytest.raises(Refusal) as full:
            line.enter([waits_for(gate, "e")])
        assert full.value.problem.status == 429
        assert int(full.value.problem.headers["Retry-After"]) >= 1
        with pytest.raises(Refusal) as many:
            line.enter([waits_for(gate, "f")] * 4)
        assert many.value.problem.status == 400
        gate.set()
        assert [(await ticket.hear()).text for ticket in tickets] == ["a", "b", "c", "d"]

    heard(line, run)


def test_who_leaves_frees_a_place_at_once():
    line, gate = Line(1), threading.Event()

    async def run():
        (first,) = line.enter([waits_for(gate, "a")])
        for _ in range(100):
            (one,) = line.enter([waits_for(gate, "never")])
            with pytest.raises(Refusal):
                line.enter([waits_for(gate, "x")])
            one.cancel()
            assert line.waiting <= 1
        (last,) = line.enter([waits_for(gate, "z")])
        gate.set()
        assert (await first.hear()).text == "a"
        assert (await last.hear()).text == "z"
        assert one._events.empty()

    heard(line, run)


def test_work_that_fails_is_told_and_the_next_is_done():
    line, gate = Line(3), threading.Event()
    gate.set()

    def fails(ticket):
        raise KeyError("secret")

    async def run():
        bad, good = line.enter([fails, waits_for(gate, "fine")])
        failed = await bad.hear()
        assert isinstance(failed, Failed)
        assert failed.problem.status == 500
        assert "secret" not in failed.problem.message
        assert (await good.hear()).text == "fine"

    heard(line, run)


def test_closing_ends_what_runs_and_what_waits():
    line = Line(3)
    started = threading.Event()

    def runs(ticket):
        started.set()
        while not ticket.cancelled:
            time.sleep(0.001)

    async def run():
        tickets = line.enter([runs, runs, runs])
        while not started.is_set():
            await asyncio.sleep(0.001)
        await asyncio.to_thread(line.close)
        for ticket in tickets:
            assert (await ticket.hear()).problem.status == 503
        with pytest.raises(Refusal) as closed:
            line.enter([runs])
        assert closed.value.problem.status == 503

    before = threading.active_count()
    asyncio.run(run())
    assert threading.active_count() == before
