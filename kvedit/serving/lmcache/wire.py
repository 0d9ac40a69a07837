"""Wire: requests to an LMCache server, as its own clients send them.

LMCache's library is not needed here: it brings some ninety packages, among them CUDA's. A request
is the frames number, operation, then each argument; an answer is number, operation, and the result
unless that is None; all of them MessagePack over a ZeroMQ DEALER socket (LMCache 0.5.6,
``multiprocess/transport/zmq_impl``). A server that fails at a request only logs it and never
answers.
"""

from __future__ import annotations

import importlib
from types import TracebackType
from typing import Any

from kvedit.errors import MissingDependency, TierUnavailable

__all__ = ["Wire", "decode", "encode"]


def encode(value: Any) -> bytes:
    """Returns plain data as MessagePack.

    Raises:
        MissingDependency: without msgspec.
    """
    return bytes(_library("msgspec").msgpack.encode(value))


def decode(data: bytes) -> Any:
    """Returns the plain data that :func:`encode` wrote."""
    return _library("msgspec").msgpack.decode(data)


class Wire:
    """A connection to a server; one request at a time.

    Args:
        address: such as ``tcp://127.0.0.1:5555``.
        timeout: seconds that an answer may take.

    Raises:
        MissingDependency: without pyzmq or msgspec.
    """

    def __init__(self, address: str, timeout: float) -> None:
        zmq = _library("zmq")
        _library("msgspec")
        self._address, self._timeout, self._number = address, timeout, 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def __enter__(self) -> Wire:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the connection."""
        self._socket.close()
        self._context.term()

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Returns the server's answer to one request.

        Args:
            operation: its name.
            *arguments: plain data.

        Raises:
            TierUnavailable: if no answer comes in time.
        """
        self._number += 1
        frames = [self._number, operation, *arguments]
        self._socket.send_multipart([encode(frame) for frame in frames])
        while self._socket.poll(int(self._timeout * 1000)):
            number, _, *result = self._socket.recv_multipart()
            if decode(number) == self._number:
                return decode(result[0]) if result else None
        raise TierUnavailable(
            f"LMCache at {self._address} did not answer {operation} in {self._timeout:g} s: it "
            "is gone, or failed, which only its own log says"
        )


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(name, "lmcache", "exporting to LMCache") from error
