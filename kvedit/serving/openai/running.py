"""run: the application on a socket, until a signal ends it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

__all__ = ["listen", "run"]

_GRACE = 20  # seconds that answers under way get when the server is told to stop


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket bound to a place, before anything slow begins.

    Args:
        host: name or address.
        port: number; 0 takes a free one.

    Raises:
        OSError: if it can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def run(app: Any, place: socket.socket, ready: Callable[[], None], grace: int = _GRACE) -> None:
    """Serves until SIGINT or SIGTERM: then no more is taken on, and what runs gets some time.

    Args:
        app: the ASGI application.
        place: where; see :func:`listen`. It is closed at the end.
        ready: called once requests are taken.
        grace: seconds that answers under way get.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=grace,
    )
    try:
        _Server(config, ready).run(sockets=[place])
    except KeyboardInterrupt:  # the server ended in order, and hands the signal on
        return
