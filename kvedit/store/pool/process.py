"""A native client in a process of its own: every call has a bound, and can be given up."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvedit.errors import TierUnavailable

__all__ = ["ClientProcess"]

_WORKER = Path(__file__).with_name("worker.py")


class ClientProcess:
    """The process that holds the native client, and the memory that is shared with it.

    The native client holds Python's interpreter lock while it joins and leaves a pool (90 s without
    a master), crashes when it is called after it was closed, and prints. So it lives elsewhere: a
    call that takes too long ends that process, and this one goes on.

    Args:
        scratch_bytes: size of the shared memory; the largest value that can be moved.
        seconds: how long one call may take.
        log: file that receives what the native client prints; None drops it.
    """

    def __init__(self, scratch_bytes: int, seconds: float, log: str | None = None) -> None:
        self._owner = os.getpid()
        self._seconds = seconds
        self._reason = ""
        ours, theirs = socket.socketpair()
        memory = os.memfd_create("kvedit-pool")
        try:
            os.ftruncate(memory, scratch_bytes)
            self.scratch = memoryview(mmap.mmap(memory, scratch_bytes))
            with theirs:
                self._process = _spawn(theirs.fileno(), memory, scratch_bytes, log)
        finally:
            os.close(memory)
        self._line = ours
        self._stream = ours.makefile("rw", encoding="utf-8", newline="\n")

    def call(self, op: str, **arguments: Any) -> Any:
        """Returns what the native client answered to ``op``.

        Raises:
            TierUnavailable: if it did not answer in time, ended, failed, or was closed before.
        """
        self._check()
        found = self._ask(op, self._seconds, arguments)
        if isinstance(found, str):
            raise TierUnavailable(f"the Mooncake client failed at {op!r}: {found}")
        return found

    def close(self, seconds: float) -> None:
        """Lets the client leave the pool, ends its process, at most ``seconds`` later.

        Closing again does nothing. In a forked process it only lets go of the descriptors.
        """
        if os.getpid() == self._owner and not self._reason:
            # Where it can't leave, it is ended below all the same.
            with contextlib.suppress(TierUnavailable):
                self._ask("close", seconds, {})
            self._end("it was closed")
        self._reason = self._reason or "it was closed"

    def _check(self) -> None:
        if os.getpid() != self._owner:
            raise TierUnavailable(
                f"this pool was opened by process {self._owner} and can't be used in its fork "
                f"{os.getpid()}: open a pool there"
            )
        if self._reason:
            raise TierUnavailable(
                f"the Mooncake client is gone: {self._reason}. Open a new pool to go on"
            )

    def _ask(self, op: str, seconds: float, arguments: dict[str, Any]) -> Any:
        self._line.settimeout(seconds)
        try:
            self._stream.write(json.dumps({"op": op, **arguments}) + "\n")
            self._stream.flush()
            text = self._stream.readline()
        except TimeoutError as error:
            self._end(f"{op!r} took longer than {seconds:g} s")
            raise TierUnavailable(f"Mooncake: {self._reason}; open a new pool") from error
        except OSError as error:
            self._end(f"its process ended at {op!r} ({error})")
            raise TierUnavailable(f"Mooncake: {self._reason}; open a new pool") from error
        except BaseException:
            # An interrupt between question and answer: the next answer would be the wrong one.
            self._end(f"{op!r} was interrupted")
            raise
        if not text:
            self._end(f"its process ended at {op!r}")
            raise TierUnavailable(f"Mooncake: {self._reason}; open a new pool")
        return json.loads(text)

    def _end(self, reason: str) -> None:
        """Ends the process for good; the pool forgets its objects when it misses its heartbeat."""
        self._reason = reason
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # what was not sent yet has no reader any more
            self._stream.close()
        self._line.close()


def _spawn(line: int, memory: int, size: int, log: str | None) -> subprocess.Popen[bytes]:
    """Returns the process. -P: the folder of the worker holds a ``mooncake.py`` of our own."""
    command = [sys.executable, "-P", str(_WORKER), str(line), str(memory), str(size)]
    target = Path(log).open("ab") if log else None  # noqa: SIM115 - closed below
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=target or subprocess.DEVNULL,
            stderr=target or subprocess.DEVNULL,
            pass_fds=(line, memory),
            start_new_session=True,  # Ctrl-C is for this process, not for the one that owns bytes
        )
    finally:
        if target:
            target.close()
