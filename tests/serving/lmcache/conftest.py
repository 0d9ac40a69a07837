"""A real LMCache server, in the process and the environment of its own.

LMCache's requirements don't go together with kvedit's. Make an environment for it as
docs/serving.md says and name its folder in KVEDIT_LMCACHE; without, these tests skip.
"""

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from kvedit.testing.servers import free_ports

PATIENCE = 120.0  # seconds until the server must answer
QUIET = {
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_LOG_LEVEL": "WARNING",
    "LMCACHE_TRACK_USAGE": "false",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Running:
    """A server: its HTTP endpoint, its ZeroMQ port, and the folder of its environment."""

    url: str
    port: int
    folder: Path

    def post(self, path: str) -> bytes:
        request = Request(f"{self.url}/{path}", b"", method="POST")
        with build_opener(ProxyHandler({})).open(request, None, 10) as answer:
            return answer.read()

    def python(self, script: str, *arguments: str) -> None:
        """Runs a script with the environment's own Python, where LMCache is."""
        command = [str(self.folder / "bin" / "python"), "-c", script, *arguments]
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **QUIET}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="session")
def lmcache(tmp_path_factory):
    folder = Path(os.environ.get("KVEDIT_LMCACHE", ""))
    if not (folder / "bin" / "lmcache").is_file():
        pytest.skip("LMCache lives in an environment of its own: name it in KVEDIT_LMCACHE")
    with started(folder, tmp_path_factory.mktemp("lmcache")) as running:
        yield running


@contextlib.contextmanager
def started(folder, logs, *options):
    port, http = free_ports(2)
    command = [
        str(folder / "bin" / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(port),
        "--http-port", str(http), "--supported-transfer-mode", "auto", "--shm-name", f"t{port}",
        "--no-l1-use-lazy", "--l1-size-gb", "0.5", "--eviction-policy", "LRU",
        "--disable-observability", "--max-workers", "1", *options,
    ]  # fmt: skip
    with (logs / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **QUIET}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        running = Running(f"http://127.0.0.1:{http}", port, folder)
        _wait(running.url, process, logs / "server.log")
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(url, process, log):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            build_opener(ProxyHandler({})).open(f"{url}/healthcheck", None, 2).close()
            return
        time.sleep(0.2)
    pytest.fail(f"LMCache did not start: {log.read_text(errors='replace')[-3000:]}")
