"""Shared pieces of the endpoint's tests: a store with five memories, the application, clients."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import pytest

import kvedit as kv
from kvedit.editors import Drop, Emphasize, SpotLight
from kvedit.models import load
from kvedit.serving.openai import create_app

MODEL = "tiny:llama"
TEXT = (
    "The handbook of the shop number {}. Refunds are possible within {} days. "
    "Shipping takes three days and costs four euros."
)
CHAT = [{"role": "system", "content": "You are a clerk. Refunds take 60 days."}]


@pytest.fixture(scope="package")
def loaded():
    """A tiny model by its name, and its tokenizer."""
    return load(MODEL)


@pytest.fixture(scope="package")
def memories(loaded):
    """Five memories: plain, biased, with gaps, of a chat, and with a rule for the run time."""
    model, tokenizer = loaded
    ruled = SpotLight(spans=("within 30 days",), target=0.3)
    plain = kv.capture(model, tokenizer, TEXT.format(1, 60))
    return {
        "plain": plain,
        "biased": Emphasize(span="within 60 days", strength=2.3)(plain),
        "gaps": Drop(span="Shipping takes three days")(plain),
        "chat": kv.capture(model, tokenizer, CHAT),
        "other/one": ruled(kv.capture(model, tokenizer, TEXT.format(2, 30))),
    }


@pytest.fixture
def store(tmp_path, memories):
    """A store that holds them."""
    with kv.Store(tmp_path / "memories", durability="none") as opened:
        opened.put_many(memories)
        yield opened


@pytest.fixture
def app(loaded, store):
    """The application on that store."""
    return create_app(*loaded, store)


@asynccontextmanager
async def serving(app):
    """Yields an httpx client of an application, within its lifespan."""
    transport = httpx.ASGITransport(app=app)
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client


@pytest.fixture
def served():
    """How to open a client of an application."""
    return serving


@pytest.fixture
def ask(loaded, store):
    """Posts bodies to an application, one after another; returns the responses."""

    def call(*requests, app=None):
        async def run():
            async with serving(app or create_app(*loaded, store)) as client:
                return [await client.post(f"/v1/{path}", json=body) for path, body in requests]

        return asyncio.run(run())

    return call


def events(text):
    """The data of server-sent events."""
    frames = text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") for frame in frames)
    return [frame.removeprefix("data: ") for frame in frames]


@pytest.fixture
def chunks():
    """Reads a stream: checks its end, and returns its chunks."""

    def read(text):
        found = events(text)
        assert found[-1] == "[DONE]"
        return [json.loads(one) for one in found[:-1]]

    return read


class Call:
    """One request to an ASGI application, whose client can leave at any time."""

    def __init__(self, app, path, body):
        self.messages = []
        self.left = asyncio.Event()
        self.came = asyncio.Condition()
        self._body = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": f"/v1/{path}",
            "raw_path": b"",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self):
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        async with self.came:
            self.messages.append(message)
            self.came.notify_all()

    async def wait_for(self, count):
        async with self.came:
            await self.came.wait_for(lambda: len(self.messages) >= count)

    async def leave(self):
        self.left.set()
        await self.task


@pytest.fixture
def call():
    """How to make a request whose client can leave."""
    return Call
