"""Line: a bounded queue in front of the one thread that runs the model."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from kvedit.serving.openai.events import Event, Failed
from kvedit.serving.openai.problems import Problem, Refusal, problem_of

__all__ = ["Line", "Ticket", "Work", "stops"]

_LONGEST_WAIT = 600  # seconds that a client is told to wait at most


class Ticket:
    """One place in the line, and what its work says so far.

    Args:
        work: what the thread does when it is this one's turn.
        leave: takes this one out of the line.
    """

    def __init__(self, work: Work, leave: Callable[[Ticket], None]) -> None:
        """Belongs to the event loop that runs now."""
        self.work = work
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more. Any thread may ask."""
        return self._cancelled.is_set()

    def say(self, event: Event) -> None:
        """Tells who waits; called by the thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def hear(self) -> Event:
        """Returns the next thing said."""
        return await self._events.get()

    def cancel(self) -> None:
        """Gives the place up; work that runs ends at its next token."""
        self._cancelled.set()
        self._leave(self)


Work = Callable[[Ticket], Any]


def stops() -> Problem:
    """Returns what those are told who come, or wait, when the server stops."""
    return Problem(503, "the server stops", None, "server_stops")


class Line:
    """First come, first served; one at a time, since a model is not for several threads.

    Args:
        size: how many may wait, beside the one whose turn it is.
    """

    def __init__(self, size: int) -> None:
        """Starts no thread before somebody comes."""
        self._size = size
        self._waiting: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._seconds = 1.0  # of one work, lately

    @property
    def waiting(self) -> int:
        """How many wait."""
        with self._changed:
            return len(self._waiting)

    @property
    def running(self) -> bool:
        """Whether it is somebody's turn."""
        with self._changed:
            return self._current is not None

    def enter(self, works: Sequence[Work]) -> list[Ticket]:
        """Returns a place for each work, or for none.

        Raises:
            Refusal: if there is no room, or the server stops.
        """
        tickets = [Ticket(work, self._leave) for work in works]
        with self._changed:
            if self._closed:
                raise Refusal(stops())
            if len(tickets) > self._size:
                raise Refusal(
                    Problem(400, f"expected at most {self._size} prompts, found {len(tickets)}",
                            "prompt", "too_many_prompts")
                )  # fmt: skip
            if len(self._waiting) + (self._current is not None) + len(tickets) > self._size + 1:
                raise Refusal(self._full())
            self._waiting.extend(tickets)
            self._start()
            self._changed.notify_all()
        return tickets

    def close(self) -> None:
        """Sends everybody away and waits for the thread to end."""
        with self._changed:
            self._closed = True
            current = [self._current] if self._current else []
            tickets, thread = [*self._waiting, *current], self._thread
        for ticket in tickets:
            ticket.cancel()
            ticket.say(Failed(stops()))
        with self._changed:
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    def _full(self) -> Problem:
        wait = math.ceil((len(self._waiting) + 1) * self._seconds)
        message = f"{len(self._waiting)} prompts wait already, and {self._size} may; try again"
        return Problem(429, message, None, "queue_full", max(1, min(wait, _LONGEST_WAIT)))

    def _leave(self, ticket: Ticket) -> None:
        with self._changed, suppress(ValueError):
            self._waiting.remove(ticket)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="kvedit-model", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while (ticket := self._take()) is not None:
            started = time.perf_counter()
            try:
                ticket.work(ticket)
            except BaseException as error:
                # As plain data: the error itself would keep the session alive by its traceback.
                ticket.say(Failed(problem_of(error)))
            with self._changed:
                self._seconds += 0.2 * (time.perf_counter() - started - self._seconds)
                self._current = None
            del ticket

    def _take(self) -> Ticket | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            self._current = self._waiting.popleft()
            return self._current
