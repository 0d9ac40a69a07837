"""Guard: who may ask, and how much one request may bring. In front of everything else."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvedit.serving.openai.problems import Problem, Refusal

__all__ = ["LOOPBACK", "Guard"]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Names of this machine, as the Host header of a request to it spells them."""

_OPEN = ("/health",)  # needs no key


@dataclass(frozen=True)
class Guard:
    """An ASGI application around another.

    Args:
        app: what is behind it.
        hosts: names that the Host header may have, or None for any. A web page that had its own
            name resolved to this machine would come with that name.
        key: the key that clients must send, or None.
        body: bytes of a request at most.
    """

    app: ASGIApp
    hosts: Collection[str] | None
    key: str | None
    body: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it with what is wrong."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        problem = self._problem(scope, Headers(scope=scope))
        if problem is not None:
            reply = JSONResponse(problem.body(), problem.status, headers=problem.headers)
            await reply(scope, receive, send)
            return
        await self.app(scope, self._counting(receive), send)

    def _problem(self, scope: Scope, headers: Headers) -> Problem | None:
        if self.hosts is not None and _name(headers.get("host", "")) not in self.hosts:
            return Problem(403, "this server answers to names of its own machine", "host")
        if self.key is not None and scope["path"] not in _OPEN:
            given = headers.get("authorization", "").encode("latin-1")  # the bytes as they came
            if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                return Problem(401, "expected the server's API key", None, "invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.body:
            return self._too_large()
        return None

    def _counting(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.body:
                raise Refusal(self._too_large())
            return message

        return counted

    def _too_large(self) -> Problem:
        return Problem(413, f"expected a body of at most {self.body} bytes", None, "body_too_large")


def _name(host: str) -> str:
    """Returns a Host header without its port."""
    if host.startswith("["):
        return host.split("]", 1)[0] + "]"
    return host.split(":", 1)[0].lower()
