"""Many at once: right answers for all, and nothing left behind by those who left."""

import asyncio
import gc
import json
import random
import threading
import time
import weakref

import pytest
import torch

import kvedit as kv
from kvedit.editors import Drop, Emphasize, Suppress
from kvedit.runtime.cache import MemoryCache
from kvedit.serving.openai import Limits, create_app
from kvedit.serving.openai.watching import Watch

PROMPTS = (" So how long", " Then I asked", " No")
TURN = [{"role": "user", "content": "How long may I wait?"}]
BAD = (
    ({"model": "nobody"}, 404),
    ({"temperature": "hot"}, 400),
    ({"n": 3}, 400),
    ({"prompt": [123456]}, 400),
    ({"max_tokens": 5000}, 400),
)


def requests_of(memories, tokens=8, seeds=50):
    """50 requests: 30 to answer, 10 that are wrong, 10 whose client leaves."""
    names = list(memories)
    rows = []
    for number in range(30):
        name, prompt = names[number % 5], PROMPTS[number % 3]
        body = {"model": name, "max_tokens": tokens, "stream": number % 4 == 0}
        if number % 2:
            rows.append(("completions", body | {"prompt": prompt}, "answer"))
        else:
            more = {"temperature": 1.2, "seed": number % seeds, "messages": TURN}
            rows.append(("chat/completions", body | more, "answer"))
    for number in range(10):
        changes, status = BAD[number % 5]
        body = {"model": names[number % 5], "prompt": PROMPTS[0], "max_tokens": 8}
        rows.append(("completions", body | changes, status))
    for number in range(10):
        body = {"model": names[number % 5], "prompt": PROMPTS[0], "max_tokens": 900}
        rows.append(("completions", body | {"stream": number % 2 == 0}, "leave"))
    random.Random(0).shuffle(rows)
    return rows


def said(messages):
    """Status and text of a response, whether it was streamed or not."""
    status = messages[0]["status"]
    body = b"".join(message.get("body", b"") for message in messages[1:]).decode()
    if not body.startswith("data: "):
        choices = json.loads(body).get("choices", [{}])
    else:
        frames = body.split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        choices = [json.loads(f.removeprefix("data: "))["choices"][0] for f in frames[:-2]]
    parts = [
        c.get("text") or (c.get("message") or c.get("delta") or {}).get("content") for c in choices
    ]
    return status, "".join(part or "" for part in parts)


def expected_of(loaded, memories, body):
    options = {"max_new_tokens": body["max_tokens"]}
    if "messages" in body:
        options |= {"temperature": body["temperature"], "seed": body["seed"]}
        return kv.generate(*loaded, memories[body["model"]], body["messages"], **options)
    return kv.generate(*loaded, memories[body["model"]], body["prompt"], chat=False, **options)


async def crowd(app, call, rows):
    """Makes all requests at once; returns each one's messages."""
    calls = [call(app, path, body) for path, body, _ in rows]

    async def one(number, mine, kind):
        if kind == "leave":
            if rows[number][1]["stream"]:
                await mine.wait_for(3)  # its answer has begun
            else:
                await asyncio.sleep(0.005 * number)
            await mine.leave()
        else:
            await mine.task
        return mine.messages

    doing = [one(number, mine, rows[number][2]) for number, mine in enumerate(calls)]
    return await asyncio.gather(*doing)


@pytest.fixture
def caches(monkeypatch):
    """Weak references to the caches of all sessions."""
    found = []
    start = MemoryCache.__init__

    def noted(self, *args, **kwargs):
        found.append(weakref.ref(self))
        start(self, *args, **kwargs)

    monkeypatch.setattr(MemoryCache, "__init__", noted)
    return found


def tensors():
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def test_fifty_at_once(loaded, memories, store, call, caches):
    rows = requests_of(memories)
    assert len(rows) == 50
    before = threading.active_count(), tensors()

    def run():
        app = create_app(*loaded, store)

        async def within():
            async with app.router.lifespan_context(app):
                return await crowd(app, call, rows)

        return asyncio.run(within())

    for messages, (_, body, kind) in zip(run(), rows, strict=True):
        if kind == "answer":
            assert said(messages) == (200, expected_of(loaded, memories, body))
        elif kind != "leave":
            assert messages[0]["status"] == kind
    assert len(caches) > 30
    first = tensors()
    run()
    assert threading.active_count() == before[0]
    assert [one for one in caches if one() is not None] == []
    assert tensors() == first
    assert first - before[1] < 50  # what models and tokenizers keep once


def test_sessions_end_without_the_garbage_collector(loaded, store, ask, caches):
    gc.collect()
    gc.disable()
    try:
        body = {"model": "biased", "prompt": " So", "max_tokens": 4, "logprobs": 2, "stop": "zzz"}
        bad = {"model": "biased", "prompt": [5] * 16400}
        ask(("completions", body), ("completions", body | {"stream": True}), ("completions", bad))
        assert len(caches) == 3
        alive = sum(one() is not None for one in caches)
    finally:
        gc.enable()
    assert alive == 0


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_ends_an_answer_at_the_next_token(loaded, store, call, served, monkeypatch, stream):
    noted, tokens = Watch._note, []

    def slow(self, token):
        time.sleep(0.01)
        tokens.append(token)
        noted(self, token)

    monkeypatch.setattr(Watch, "_note", slow)
    app = create_app(*loaded, store)
    body = {"model": "plain", "prompt": " So", "max_tokens": 900, "stream": stream}

    async def run():
        async with served(app) as client:
            mine = call(app, "completions", body)
            waiting = call(app, "completions", body | {"model": "gaps"})
            while len(tokens) < 5:
                await asyncio.sleep(0.005)
            health = (await client.get("/health")).json()
            assert (health["running"], health["waiting"]) == (True, 1)
            await waiting.leave()
            assert (await client.get("/health")).json()["waiting"] == 0
            await mine.leave()
            seen = len(tokens)
            after = {"model": "biased", "prompt": " So", "max_tokens": 2}
            answer = await client.post("/v1/completions", json=after)
            assert answer.status_code == 200
            assert len(tokens) <= seen + 2 + 2

    asyncio.run(run())


def test_a_full_queue_says_when_to_come_again(loaded, store, call, served, monkeypatch):
    noted = Watch._note

    def slow(self, token):
        time.sleep(0.01)
        noted(self, token)

    monkeypatch.setattr(Watch, "_note", slow)
    app = create_app(*loaded, store, limits=Limits(queue=2))
    body = {"model": "plain", "prompt": " So", "max_tokens": 600}

    async def run():
        async with served(app) as client:
            calls = [call(app, "completions", body) for _ in range(3)]
            while (await client.get("/health")).json()["waiting"] < 2:
                await asyncio.sleep(0.005)
            for stream in (True, False):
                full = await client.post("/v1/completions", json=body | {"stream": stream})
                assert full.status_code == 429
                assert full.json()["error"]["code"] == "queue_full"
                assert 1 <= int(full.headers["Retry-After"]) <= 600
            for one in calls:
                await one.leave()
            body["max_tokens"] = 1
            assert (await client.post("/v1/completions", json=body)).status_code == 200

    asyncio.run(run())


def test_the_end_of_the_server_ends_what_runs(loaded, store, call):
    app = create_app(*loaded, store)
    body = {"model": "plain", "prompt": " So", "max_tokens": 1000}
    before = threading.active_count()

    async def run():
        async with app.router.lifespan_context(app):
            calls = [call(app, "completions", body | {"stream": s}) for s in (True, False)]
            await calls[0].wait_for(3)
        await asyncio.gather(*(one.task for one in calls))
        late = call(app, "completions", body)
        await late.task
        return [one.messages for one in (*calls, late)]

    stream, waiting, late = asyncio.run(run())
    assert b"server_stops" in b"".join(message.get("body", b"") for message in stream)
    assert waiting[0]["status"] == late[0]["status"] == 503
    assert threading.active_count() == before


@pytest.mark.slow
def test_fifty_at_once_on_a_real_model(smollm, tmp_path, call, caches):
    model, tokenizer = smollm
    text = (
        "The handbook of the shop. Refunds are possible within 60 days, with the receipt. "
        "Shipping takes three days and costs four euros."
    )
    plain = kv.capture(model, tokenizer, text)
    memories = {
        "plain": plain,
        "biased": Emphasize(span="within 60 days", strength=2.0)(plain),
        "gaps": Drop(span="Shipping takes three days")(plain),
        "chat": kv.capture(model, tokenizer, [{"role": "system", "content": text}]),
        "quiet": Suppress(span="with the receipt", strength=3.0)(plain),
    }
    rows = requests_of(memories, tokens=5, seeds=2)
    threads = threading.active_count()
    with kv.Store(tmp_path / "memories", durability="none") as store:
        store.put_many(memories)
        app = create_app(model, tokenizer, store)

        async def within():
            async with app.router.lifespan_context(app):
                return await crowd(app, call, rows)

        found = asyncio.run(within())
    known = {}
    for messages, (_, body, kind) in zip(found, rows, strict=True):
        if kind == "answer":
            key = json.dumps({**body, "stream": None}, sort_keys=True)
            if key not in known:
                known[key] = expected_of(smollm, memories, body)
            assert said(messages) == (200, known[key])
        elif kind != "leave":
            assert messages[0]["status"] == kind
    assert len(set(known.values())) > 8
    assert threading.active_count() == threads
    gc.collect()
    assert [one for one in caches if one() is not None] == []
