"""What is refused: with a status from 400, by name, in OpenAI's format, and nothing breaks."""

import asyncio
import json

import pytest

import kvedit as kv
from kvedit.models import load
from kvedit.serving.openai import Limits, create_app

TURN = [{"role": "user", "content": "Hello"}]
TEXT, CHAT = "completions", "chat/completions"
OVER = [5] * 16400

REFUSED = {
    "unknown model": (TEXT, {"model": "hanbook"}, 404, "model", "plain"),
    "unknown version": (TEXT, {"model": "plain@{7}"}, 404, "model", "versions"),
    "no reference": (TEXT, {"model": "../etc/passwd"}, 404, "model", "no such memory"),
    "no model": (TEXT, {"model": None}, 400, "model", "required"),
    "number for a model": (TEXT, {"model": 5}, 400, "model", "string"),
    "no prompt": (TEXT, {"prompt": None}, 400, "prompt", "required"),
    "empty prompt": (TEXT, {"prompt": ""}, 400, None, "empty"),
    "no prompts": (TEXT, {"prompt": []}, 400, "prompt", "list of texts"),
    "mixed prompts": (TEXT, {"prompt": ["a", 1]}, 400, "prompt", "list of texts"),
    "truth as an id": (TEXT, {"prompt": [True]}, 400, "prompt", "list of texts"),
    "foreign ids": (TEXT, {"prompt": [1, 5000]}, 400, "prompt", "token ids from 0"),
    "negative ids": (TEXT, {"prompt": [-1]}, 400, "prompt", "token ids from 0"),
    "huge id": (TEXT, {"prompt": [10**30]}, 400, "prompt", ""),
    "too many prompts": (TEXT, {"prompt": ["a"] * 9}, 400, "prompt", "at most 8"),
    "too long": (TEXT, {"prompt": OVER}, 400, None, "positions"),
    "too many tokens": (TEXT, {"max_tokens": 101}, 400, "max_tokens", "at most 100"),
    "no tokens": (TEXT, {"max_tokens": 0}, 400, "max_tokens", "greater"),
    "tokens as text": (TEXT, {"max_tokens": "5"}, 400, "max_tokens", "integer"),
    "hot": (TEXT, {"temperature": 2.5}, 400, "temperature", "less than"),
    "cold": (TEXT, {"temperature": -1}, 400, "temperature", "greater"),
    "top_p": (TEXT, {"top_p": 0}, 400, "top_p", "greater"),
    "seed": (TEXT, {"seed": 2**64}, 400, "seed", ""),
    "many stops": (TEXT, {"stop": list("abcde")}, 400, "stop", "up to 4"),
    "empty stop": (TEXT, {"stop": ""}, 400, "stop", "up to 4"),
    "long stop": (TEXT, {"stop": "a" * 1000}, 400, "stop", "up to 4"),
    "logprobs": (TEXT, {"logprobs": 6}, 400, "logprobs", "less than"),
    "n": (TEXT, {"n": 2}, 400, "n", "not supported"),
    "best_of": (TEXT, {"best_of": 3}, 400, "best_of", "not supported"),
    "echo": (TEXT, {"echo": True}, 400, "echo", "not supported"),
    "suffix": (TEXT, {"suffix": "x"}, 400, "suffix", "not supported"),
    "penalty": (TEXT, {"presence_penalty": 0.1}, 400, "presence_penalty", "send 0"),
    "logit bias": (TEXT, {"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
    "no field": (TEXT, {"max_tokenz": 5}, 400, "max_tokenz", "unknown field"),
    "two memories": (TEXT, {"kv_transfer_params": {}}, 400, "kv_transfer_params", "unknown"),
    "stream": (TEXT, {"stream": "yes"}, 400, "stream", "boolean"),
    "stream options": (
        TEXT, {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream=true",
    ),
    "no messages": (CHAT, {"messages": []}, 400, "messages", "at least 1"),
    "text for messages": (CHAT, {"messages": "hi"}, 400, "messages", "list of messages"),
    "role": (
        CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "tool",
    ),
    "no content": (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
    "image": (
        CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400, "messages.0.content", "type text",
    ),
    "name": (
        CHAT, {"messages": [{"role": "user", "content": "x", "name": "Eve"}]}, 400,
        "messages.0.name", "not permitted",
    ),
    "tools": (CHAT, {"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    "format": (CHAT, {"response_format": {"type": "json_object"}}, 400, "response_format", "not"),
    "chat logprobs": (CHAT, {"logprobs": 3}, 400, "logprobs", "boolean"),
    "top_logprobs": (CHAT, {"top_logprobs": 3}, 400, "top_logprobs", "logprobs=true"),
    "two counts": (
        CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "differ",
    ),
    "prompt in a chat": (CHAT, {"prompt": "x"}, 400, "prompt", "unknown field"),
}  # fmt: skip


@pytest.fixture
def small(loaded, store):
    return create_app(*loaded, store, limits=Limits(queue=8, tokens=100, body=1 << 17))


def body_of(path, changes):
    start = {"prompt": " So"} if path == TEXT else {"messages": TURN}
    return {"model": "plain", "max_tokens": 2} | start | changes


def test_requests_are_refused_by_name(small, ask, store):
    requests = [(path, body_of(path, changes)) for path, changes, *_ in REFUSED.values()]
    streams = [(path, body | {"stream": True}) for path, body in requests]
    fine = (TEXT, body_of(TEXT, {}))
    *answers, last = ask(*requests, *streams, fine, app=small)
    assert last.status_code == 200
    for number, answer in enumerate(answers):
        name = list(REFUSED)[number % len(REFUSED)]
        _, _, status, param, words = REFUSED[name]
        if number >= len(REFUSED) and name.startswith("stream"):
            continue  # these are about requests for no stream
        assert answer.status_code == status, (name, answer.text)
        error = answer.json()["error"]
        assert error["param"] == param, name
        assert words in error["message"], (name, error)
        assert error["type"] == "invalid_request_error"
        assert str(store.path) not in answer.text
        if name == "unknown model":
            assert error["code"] == "model_not_found"
        if name == "too long":
            assert error["code"] == "context_length_exceeded"


def test_what_asks_for_nothing_is_let_through(small, ask):
    neutral = {
        "n": 1, "best_of": 1, "echo": False, "suffix": None, "presence_penalty": 0.0,
        "frequency_penalty": 0, "logit_bias": {}, "user": "me", "metadata": {"a": "b"},
        "tools": [], "response_format": {"type": "text"}, "seed": None, "stop": None,
    }  # fmt: skip
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": None}]
    bare, dressed, plain, part = ask(
        (TEXT, body_of(TEXT, {})),
        (TEXT, body_of(TEXT, neutral)),
        (CHAT, body_of(CHAT, {})),
        (CHAT, body_of(CHAT, {"messages": parts})),
        app=small,
    )
    assert bare.json()["choices"] == dressed.json()["choices"]
    assert plain.json()["choices"] == part.json()["choices"]


RAW = {
    "no JSON": (b"{bad", "application/json", 400, "invalid_json"),
    "nothing": (b"", "application/json", 400, "invalid_json"),
    "a list": (b"[1]", "application/json", 400, "invalid_json"),
    "half a character": (b'{"model": "\\ud800"}', "application/json", 400, "invalid_json"),
    "no UTF-8": (b'{"model": "\xff"}', "application/json", 400, "invalid_json"),
    "not a number": (b'{"temperature": NaN}', "application/json", 400, "invalid_json"),
    "deep": (b"[" * 5000 + b"]" * 5000, "application/json", 400, "invalid_json"),
    "a form": (b"{}", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
    "too large": (b'{"model": "%s"}' % (b"x" * (1 << 18)), "application/json", 413, None),
}


def test_bodies_are_refused(small, served):
    async def chunked(body):
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    async def run():
        async with served(small) as client:
            for name, (body, kind, status, code) in RAW.items():
                for content in (body, chunked(body)):
                    answer = await client.post(
                        "/v1/completions", content=content, headers={"Content-Type": kind}
                    )
                    assert answer.status_code == status, (name, answer.text)
                    assert answer.json()["error"]["code"] == (code or "body_too_large"), name
            for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405)):
                answer = await client.request(method, path)
                assert answer.status_code == status
                assert "/v1/completions" in answer.json()["error"]["message"]
            assert (await client.get("/v1/models/nope")).status_code == 404

    asyncio.run(run())


def test_memories_that_do_not_fit_are_refused(loaded, store, ask):
    other = load("tiny:qwen3")
    store.put(kv.capture(*other, "Of another model."), "foreign")
    texts = [f"A text to calibrate with, number {number}. " * 5 for number in range(4)]
    operand = kv.calibrate(*loaded, texts[:2], texts[2:], samples=20)
    store.put(operand, "operand")
    answers = ask(*[(TEXT, body_of(TEXT, {"model": one})) for one in ("foreign", "operand")])
    for answer, code in zip(
        answers, ("memory_of_another_model", "unsupported_memory"), strict=True
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text


def test_chats_that_a_template_renders_anew_are_refused(loaded, memories, store, ask, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}")
    answer, text = ask(
        (CHAT, body_of(CHAT, {"model": "chat"})), (TEXT, body_of(TEXT, {"model": "chat"}))
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert answer.json()["error"]["code"] == "template_not_cuttable"
    assert text.status_code == 200  # goes on as text, which no template renders


def test_damage_is_the_servers_fault_and_names_no_place(store, ask, caplog):
    packs = sorted(store.path.rglob("*"), key=lambda path: path.stat().st_size)
    pack = next(path for path in reversed(packs) if path.is_file() and "pack" in str(path))
    data = bytearray(pack.read_bytes())
    for place in range(len(data) // 3, len(data), 97):
        data[place] ^= 0xFF
    pack.chmod(0o644)
    pack.write_bytes(bytes(data))
    (answer,) = ask((TEXT, body_of(TEXT, {})))
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert str(store.path) not in answer.text
    assert "CorruptMemory" in answer.text


def test_an_error_in_a_stream_is_told_in_the_stream(loaded, app, call, monkeypatch):
    from kvedit.serving.openai.watching import Watch

    model, _ = loaded
    noted = Watch._note

    def failing(self, token):
        noted(self, token)
        if self._speller.length > 4:
            raise RuntimeError("secret /place")

    monkeypatch.setattr(Watch, "_note", failing)

    async def run():
        one = call(app, TEXT, body_of(TEXT, {"max_tokens": 20, "stream": True}))
        await one.task
        frames = b"".join(m.get("body", b"") for m in one.messages).decode().split("\n\n")
        assert one.messages[0]["status"] == 200
        assert frames[-2:] == ["data: [DONE]", ""]
        error = json.loads(frames[-3].removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
        assert "secret" not in str(error)
        assert not model._forward_hooks

    asyncio.run(run())
