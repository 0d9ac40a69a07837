"""A real S3 server, a relay that loses its answers, and a server that answers from a script."""

import contextlib
import secrets
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("obstore", reason="remote places need kvedit[s3]")

from kvedit.store.remote import Objects
from kvedit.testing.servers import ServerUnavailable, seaweedfs


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(seaweedfs(tmp_path_factory.mktemp("seaweedfs")))
        except ServerUnavailable as error:
            pytest.skip(str(error))


@pytest.fixture
def open_bucket(server):
    """Opens one fresh prefix, as often as it is called."""
    url = f"s3://{server.bucket}/{secrets.token_hex(6)}"
    return lambda **options: Objects.open(url, **{**server.options, **options})


class Relay:
    """Passes bytes on to a server; while ``losing`` is above 0, answers get lost on the way."""

    def __init__(self, port):
        self.losing, self._target = 0, ("127.0.0.1", port)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._socket.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client = self._socket.accept()[0]
                server = socket.create_connection(self._target)
                for job in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass, args=job, daemon=True).start()

    def _pass(self, source, sink, answers):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answers and self.losing:
                    self.losing -= 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay(server):
    relay = Relay(int(server.endpoint.rpartition(":")[2]))
    yield relay
    relay.close()


@pytest.fixture
def scripted():
    """A server that answers with the statuses of ``script``, then 200, and counts requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            status = script.pop(0) if script else 200
            body = b"hello" if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"e"')
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    script, seen = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", script, seen
        http.shutdown()
