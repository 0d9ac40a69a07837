"""A Mooncake master for tests: free ports, bounded waits, gone afterwards."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kvedit.testing.servers import ServerUnavailable, free_ports

__all__ = ["Master", "mooncake_master"]

_START_SECONDS = 20.0
_STEP_SECONDS = 0.05
_LIFE_SECONDS = 2
_LEASE_MILLISECONDS = 500


class Master:
    """A master on 127.0.0.1 that can be killed and started again at the same address.

    Args:
        folder: where its log goes.

    Raises:
        ServerUnavailable: if its program or a library of it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._program = _program()
        self._log = folder / "mooncake_master.log"
        self._port, self._metrics = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Host and port, as clients want it."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Starts it and waits until it listens.

        Raises:
            ServerUnavailable: if it ends or does not listen in time.
        """
        flags = (
            f"--rpc_address=127.0.0.1 --rpc_port={self._port} --metrics_host=127.0.0.1 "
            f"--metrics_port={self._metrics} --client_ttl={_LIFE_SECONDS} "
            f"--default_kv_lease_ttl={_LEASE_MILLISECONDS} --enable_metric_reporting=false"
        )
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_bound_to_us(), str(self._program), *flags.split()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait(self._process)

    def kill(self) -> None:
        """Ends its process group with SIGKILL; does nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return
            time.sleep(_STEP_SECONDS)
        said = self._log.read_text(errors="replace")[-500:]
        self.kill()
        raise ServerUnavailable(f"mooncake_master did not start: {said}")


@contextlib.contextmanager
def mooncake_master(folder: Path) -> Iterator[Master]:
    """Yields a running master; it is killed at the end, whatever happened.

    Args:
        folder: where its log goes.

    Raises:
        ServerUnavailable: if it can't run here.
    """
    master = Master(folder)
    try:
        master.start()
        yield master
    finally:
        master.kill()


def _program() -> Path:
    """Returns the path of the master, once it and the native client are known to load.

    Raises:
        ServerUnavailable: if not; the message names what is missing.
    """
    spec = importlib.util.find_spec("mooncake")
    if spec is None or spec.origin is None:
        raise ServerUnavailable("needs mooncake: pip install 'kvedit[mooncake]'")
    program = Path(spec.origin).with_name("mooncake_master")
    if not program.is_file() or not os.access(program, os.X_OK):
        raise ServerUnavailable(f"{program} is missing or can't be run")
    for command in ([str(program), "--version"], [sys.executable, "-Pc", "import mooncake.store"]):
        tried = subprocess.run(command, capture_output=True, timeout=60, check=False)
        if tried.returncode != 0:
            said = tried.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise ServerUnavailable(f"Mooncake does not load (libibverbs1 installed?): {said}")
    return program


def _bound_to_us() -> list[str]:
    """Returns the prefix of a command that dies with this process, even by SIGKILL."""
    found = shutil.which("setpriv")
    return [found, "--pdeathsig", "KILL"] if found else []
