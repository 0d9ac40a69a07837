"""The process of the native Mooncake client; run by file path, imports nothing of kvedit."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
from typing import Any

CLOSE_SECONDS = 15


class Worker:
    """Answers requests with the native client.

    Args:
        scratch: memory shared with the process that asks; values travel through it.
    """

    def __init__(self, scratch: mmap.mmap) -> None:
        self._size = len(scratch)
        # The address stays valid as long as the exported array is alive.
        self._view = (ctypes.c_char * self._size).from_buffer(scratch)
        self._address = ctypes.addressof(self._view)
        self._client: Any = None

    def answer(self, request: dict[str, Any]) -> int | list[int] | str:
        """Returns what the native call returned; an exception becomes its text."""
        try:
            found: int | list[int] = getattr(self, f"do_{request.pop('op')}")(**request)
        except Exception as error:  # the other side decides what it means
            return f"{type(error).__name__}: {error}"
        return found

    def do_setup(self, **config: Any) -> int:
        """Returns 0 once the client has joined the pool."""
        from mooncake.store import MooncakeDistributedStore  # native, slow to load

        client = MooncakeDistributedStore()
        code = int(
            client.setup(
                config["local_host"],
                config["metadata"],
                config["segment_bytes"],
                config["buffer_bytes"],
                config["protocol"],
                config["device"],
                config["master"],
            )
        )
        # RDMA reads and writes registered memory only; TCP does not mind.
        code = code or int(client.register_buffer(self._address, self._size))
        if code == 0:
            self._client = client
        return code

    def do_put(self, key: str, size: int) -> int:
        """Returns 0 if the pool has an object ``key``: these bytes or the ones that were there."""
        return int(self._client.put_from(key, self._address, size))

    def do_get(self, key: str) -> int:
        """Returns how many bytes of the object are in the scratch now, or a negative code."""
        return int(self._client.get_into(key, self._address, self._size))

    def do_exist(self, keys: list[str]) -> list[int]:
        """Returns for each key 1, 0 or a negative code."""
        return list(self._client.batch_is_exist(keys))

    def do_remove(self, keys: list[str]) -> list[int]:
        """Returns for each key 0 or a negative code; leases of readers are ignored."""
        return list(self._client.batch_remove(keys, True))

    def do_close(self) -> int:
        """Returns 0 once the client has left the pool; at most ``CLOSE_SECONDS`` later."""
        client, self._client = self._client, None
        if client is None:
            return 0
        # With a dead master this takes long; the default action of SIGALRM ends the process.
        signal.alarm(CLOSE_SECONDS)
        return int(client.close())


def serve(line: socket.socket, worker: Worker) -> None:
    """Answers until the other side closes its end or says close."""
    with line.makefile("rw", encoding="utf-8", newline="\n") as stream:
        for text in stream:
            request = json.loads(text)
            last = request["op"] == "close"
            stream.write(json.dumps(worker.answer(request)) + "\n")
            stream.flush()
            if last:
                return


def main() -> None:
    """Serves on the inherited socket and shared memory whose descriptors are the arguments."""
    line = socket.socket(fileno=int(sys.argv[1]))
    worker = Worker(mmap.mmap(int(sys.argv[2]), int(sys.argv[3])))
    try:
        serve(line, worker)
        worker.do_close()  # nothing to do, unless the other side just went away
    finally:
        # Destructors of the native client abort or hang now and then; it has left already.
        os._exit(0)


if __name__ == "__main__":
    main()
