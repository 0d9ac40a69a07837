"""Service: from a request to a response, between the line and the answerer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvedit.serving.openai.answering import Answerer
from kvedit.serving.openai.events import Failed, Finished, Piece
from kvedit.serving.openai.jobs import jobs_of
from kvedit.serving.openai.limits import Limits
from kvedit.serving.openai.problems import Problem, Refusal
from kvedit.serving.openai.queueing import Line, Ticket, stops
from kvedit.serving.openai.replies import Format
from kvedit.serving.openai.schema import AnyAsked, parse
from kvedit.serving.openai.streaming import EventStream

__all__ = ["Service"]

Result = TypeVar("Result")

_GONE = 499  # what servers log for a client that left; nobody gets it


class _ClientGone(Exception):
    """The client left before its answer was there."""


class Service:
    """The endpoint's work, one instance per application.

    Args:
        answerer: runs the model.
        limits: what it takes on.
    """

    def __init__(self, answerer: Answerer, limits: Limits) -> None:
        """Starts no thread before the first request."""
        self.answerer, self.memories, self.limits = answerer, answerer.memories, limits
        self.line = Line(limits.queue)
        self._desk = ThreadPoolExecutor(1, thread_name_prefix="kvedit-store")
        self._closed = False

    async def look_up(self, work: Any, *args: Any) -> Any:
        """Returns what a question to the store gives; asked in a thread of its own.

        Raises:
            Refusal: if the server stops.
        """
        if self._closed:
            raise Refusal(stops())
        return await asyncio.get_running_loop().run_in_executor(self._desk, work, *args)

    async def close(self) -> None:
        """Ends what runs at its next token, and all threads. There is no way back."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._desk, self.line.close)
        self._desk.shutdown()
        self.memories.close()

    async def respond(
        self, request: Request, kind: type[AnyAsked], style: type[Format]
    ) -> Response:
        """Returns the answer to a request; its places in the line are free when it was sent.

        Args:
            request: the request.
            kind: what its body should be.
            style: how answers are written.

        Raises:
            Refusal: if it is refused.
            KVEditError: likewise.
        """
        asked = parse(kind, await _body(request))
        jobs = jobs_of(asked, self.limits.tokens)
        record = await self.look_up(self.memories.resolve, asked.model)
        form = style.of(asked.model, "" if record is None else record.record)
        tickets = self.line.enter([partial(self.answerer.answer, record, job) for job in jobs])
        try:
            if asked.stream:
                first = await _unless_gone(request, tickets[0].hear())
                if isinstance(first, Failed):
                    raise Refusal(first.problem)
                return EventStream(tickets, first, form, asked.include_usage)
            answers = await _unless_gone(request, _all(tickets))
        except BaseException as error:
            for ticket in tickets:
                ticket.cancel()
            if isinstance(error, _ClientGone):
                return Response(status_code=_GONE)
            raise
        return JSONResponse(form.body(answers))


async def _body(request: Request) -> bytes:
    # A web page can send other types anywhere without asking; this one it may not.
    kind = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
    if kind != "application/json":
        message = f"expected Content-Type: application/json, found {kind or 'none'}"
        raise Refusal(Problem(415, message, None, "unsupported_media_type"))
    return await request.body()


async def _all(tickets: Sequence[Ticket]) -> list[Finished]:
    answers = []
    for ticket in tickets:
        event = await ticket.hear()
        while isinstance(event, Piece):
            event = await ticket.hear()
        if isinstance(event, Failed):
            raise Refusal(event.problem)
        answers.append(event)
    return answers


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns what the work returns, unless the client leaves first."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise _ClientGone
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
