"""EventStream: answers as server-sent events, token by token, in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvedit.serving.openai.events import Event, Failed, Finished, Piece
from kvedit.serving.openai.queueing import Ticket
from kvedit.serving.openai.replies import Format, usage

__all__ = ["EventStream"]


class EventStream(StreamingResponse):
    """A response that gives its places in the line up when it ends, however it ends.

    Args:
        tickets: one place per prompt, in order.
        first: the first thing that the first one said.
        format: how chunks are written.
        include_usage: whether to tell the counts at the end.
    """

    def __init__(
        self, tickets: Sequence[Ticket], first: Event, format: Format, include_usage: bool
    ) -> None:
        """Sends nothing yet."""
        self._tickets = tickets
        super().__init__(
            _frames(tickets, first, format, include_usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer until it ends or the client is gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for ticket in self._tickets:
                ticket.cancel()


async def _frames(
    tickets: Sequence[Ticket], first: Event, format: Format, include_usage: bool
) -> AsyncIterator[str]:
    more: dict[str, Any] = {"usage": None} if include_usage else {}
    answers: list[Finished] = []
    for chunk in format.opening():
        yield _frame(chunk | more)
    for index, ticket in enumerate(tickets):
        event: Event = first if index == 0 else await ticket.hear()
        while isinstance(event, Piece):
            if event.text or event.chosen is not None:
                yield _frame(format.piece(index, event) | more)
            event = await ticket.hear()
        if isinstance(event, Failed):
            # The status was sent long ago; clients look for an error in the stream.
            yield _frame(event.problem.body())
            yield _frame("[DONE]")
            return
        answers.append(event)
        yield _frame(format.closing(index, event) | more)
    if include_usage:
        yield _frame(format.chunk([]) | {"usage": usage(answers)})
    yield _frame("[DONE]")


def _frame(data: dict[str, Any] | str) -> str:
    text = data if isinstance(data, str) else json.dumps(data, allow_nan=False)
    return f"data: {text}\n\n"
