"""Endpoint: ``kvedit serve`` in a process of its own, and requests to it without a library."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from kvedit.errors import KVEditError

__all__ = ["Endpoint", "Streamed", "serving"]

_READY = re.compile(r" at (http://\S+)$")
_DONE = "[DONE]"
_ENDING = 30.0  # seconds that the process gets to end by itself


@dataclass(frozen=True)
class Streamed:
    """An answer that came token by token.

    Args:
        text: all of it.
        first: seconds to its first piece.
        seconds: seconds to its end.
    """

    text: str
    first: float
    seconds: float


@dataclass(frozen=True)
class Endpoint:
    """A server that runs.

    Args:
        url: its address, up to ``/v1``.
        pid: its process.
        started: seconds until it took requests.
    """

    url: str
    pid: int
    started: float

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request.

        Args:
            path: for example ``"completions"``.
            body: the request.

        Raises:
            KVEditError: if it is refused.
        """
        with self._open(path, body) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def stream(self, path: str, body: Mapping[str, Any]) -> Streamed:
        """Returns the answer to a request that is streamed.

        Raises:
            KVEditError: if it is refused, or fails on the way.
        """
        pieces, first, began = [], 0.0, time.perf_counter()
        with self._open(path, {**body, "stream": True}) as reply:
            for line in reply:
                data = line.decode().removeprefix("data: ").strip()
                if not data or data == _DONE:
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise KVEditError(f"the endpoint failed: {chunk['error']['message']}")
                choice = chunk["choices"][0]
                piece = choice.get("text") or choice.get("delta", {}).get("content")
                if piece:
                    first = first or time.perf_counter() - began
                    pieces.append(piece)
        return Streamed("".join(pieces), first, time.perf_counter() - began)

    def _open(self, path: str, body: Mapping[str, Any]) -> Any:
        request = Request(
            f"{self.url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            # Without a proxy of the environment: the server is on this machine.
            return build_opener(ProxyHandler({})).open(request)
        except HTTPError as error:
            told = json.load(error)["error"]["message"]
            raise KVEditError(f"the endpoint refused with {error.code}: {told}") from None


@contextmanager
def serving(options: Sequence[str], threads: int, patience: float) -> Iterator[Endpoint]:
    """Runs ``kvedit serve`` on a free port of this machine within the block.

    Args:
        options: further words of its command line.
        threads: torch threads.
        patience: seconds until it must take requests.

    Yields:
        The endpoint.

    Raises:
        KVEditError: if it does not start; with what it said.
    """
    command = [sys.executable, "-m", "kvedit.runs.cli", "serve", "--port", "0", *options]
    env = {name: value for name, value in os.environ.items() if name != "KVEDIT_API_KEY"}
    process = subprocess.Popen(
        command,
        env=env | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reading = threading.Thread(target=_drain, args=(process.stderr, lines), daemon=True)
    reading.start()
    try:
        began = time.perf_counter()
        url = _wait(lines, began + patience)
        yield Endpoint(url, process.pid, time.perf_counter() - began)
    finally:
        _end(process)
        reading.join()


def _drain(stderr: IO[str] | None, lines: queue.Queue[str | None]) -> None:
    # To the end, also when nobody listens: a full pipe would stop the server.
    for line in stderr or ():
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _wait(lines: queue.Queue[str | None], until: float) -> str:
    last = "it said nothing"
    while True:
        try:
            line = lines.get(timeout=max(0.0, until - time.perf_counter()))
        except queue.Empty:
            raise KVEditError(f"the endpoint did not start in time; it said: {last}") from None
        if line is None:
            raise KVEditError(f"the endpoint ended before it served: {last}")
        if (found := _READY.search(line)) is not None:
            return found[1]
        last = line


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
