"""``kvedit serve`` as a process of its own, and OpenAI's own client on its socket."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest

import kvedit as kv
from kvedit.errors import MissingDependency
from kvedit.runs.cli import main
from kvedit.serving.openai import running

PROMPT = " So how long may I wait"
TURN = [{"role": "user", "content": "How long may I wait?"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory, memories):
    """A folder with a store of the five memories."""
    folder = tmp_path_factory.mktemp("serving") / "memories"
    with kv.Store(folder, durability="none") as store:
        store.put_many(memories)
    return folder


@pytest.fixture(scope="module")
def server(place):
    """A server on a free port; its process and its address."""
    command = [sys.executable, "-m", "kvedit.runs.cli", "serve", str(place), "--port", "0"]
    command += ["--max-tokens", "4000", "--api-key", "geheim", "--json"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        line = process.stderr.readline()
        found = re.search(r"5 memories of .* at (http://127\.0\.0\.1:\d+/v1)$", line)
        assert found, line + process.stderr.read()
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server[1], api_key="geheim", max_retries=0) as made:
        yield made


def health(url):
    return httpx.get(url.removesuffix("v1") + "health").json()


def test_openais_client_gets_the_librarys_answers(client, loaded, memories, server):
    listed = client.models.list().data
    assert {one.id for one in listed} == {*memories, loaded[0].name_or_path}
    text = client.completions.create(model="biased", prompt=PROMPT, max_tokens=12, logprobs=2)
    expected = kv.generate(*loaded, memories["biased"], PROMPT, max_new_tokens=12)
    assert text.choices[0].text == expected
    assert len(text.choices[0].logprobs.token_logprobs) == text.usage.completion_tokens == 12
    assert text.usage.prompt_tokens_details.cached_tokens == memories["biased"].slots
    options = {"temperature": 1.1, "top_p": 0.8, "seed": 3}
    chat = client.chat.completions.create(
        model="chat", messages=TURN, max_completion_tokens=12, logprobs=True, **options
    )
    expected = kv.generate(*loaded, memories["chat"], TURN, max_new_tokens=12, **options)
    assert chat.choices[0].message.content == expected
    assert chat.choices[0].finish_reason == "length"
    again = [*TURN, chat.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
    second = client.chat.completions.create(model="chat", messages=again, max_tokens=5)
    turns = [{"role": one["role"], "content": one["content"]} for one in again]
    assert second.choices[0].message.content == kv.generate(
        *loaded, memories["chat"], turns, max_new_tokens=5
    )


def test_openais_client_reads_streams(client, loaded, memories):
    stream = client.chat.completions.create(
        model="other/one", messages=TURN, max_tokens=12, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = list(stream)
    said = "".join(one.choices[0].delta.content or "" for one in chunks)
    assert said == kv.generate(*loaded, memories["other/one"], TURN, max_new_tokens=12)
    assert last.usage.completion_tokens == 12
    text = client.completions.create(model="plain", prompt=PROMPT, max_tokens=9, stream=True)
    said = "".join(one.choices[0].text for one in text)
    assert said == kv.generate(*loaded, memories["plain"], PROMPT, max_new_tokens=9)


def test_openais_client_understands_refusals(client, server):
    with pytest.raises(openai.NotFoundError, match="no memory"):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError, match="n is not supported") as refused:
        client.completions.create(model="plain", prompt="x", n=2)
    assert (refused.value.param, refused.value.code) == ("n", "unsupported_field")
    with openai.OpenAI(base_url=server[1], api_key="falsch", max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError):
            other.models.list()


def test_a_closed_connection_frees_the_place(client, server):
    stream = client.completions.create(model="plain", prompt=PROMPT, max_tokens=4000, stream=True)
    next(iter(stream))
    assert health(server[1])["running"]
    stream.close()
    until = time.monotonic() + 5
    while health(server[1])["running"]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_signal_ends_it_after_what_is_under_way(client, server):
    process, url = server
    stream = client.completions.create(model="plain", prompt=PROMPT, max_tokens=150, stream=True)
    first = next(iter(stream))
    process.send_signal(signal.SIGINT)
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "length"
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert first.choices[0].text
    assert json.loads(out)["url"] == url
    assert err == ""
    with pytest.raises(httpx.ConnectError):
        health(url)


REFUSED = {
    "several models": (("serve",), "--model"),
    "an empty store": (("serve", "nowhere"), "no memory"),
    "a taken port": (("serve", "--model", "tiny:llama", "--port", "{port}"), "in use"),
    "no size": (("serve", "--model", "tiny:llama", "--cache-bytes", "lots"), "10GiB"),
}


@pytest.mark.parametrize(("words", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_refused_before_a_model_is_loaded(
    words, expected, tmp_path, memories, capsys, monkeypatch
):
    import socket

    from kvedit.models import load

    def never(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVEDIT_STORE", raising=False)
    with kv.Store("memories", durability="none") as store:
        store.put(memories["plain"], "one")
        store.put(kv.capture(*load("tiny:qwen3"), "Another text."), "two")
    monkeypatch.setattr("kvedit.runs.verbs.serve.load_model", never)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main([word.format(port=port) for word in words]) == 1
    assert expected in capsys.readouterr().err


def test_another_host_is_served_with_a_warning(tmp_path, memories, capsys, monkeypatch):
    started = []
    listen = running.listen

    def listening(host, port):
        started.append(host)
        return listen("127.0.0.1", port)

    monkeypatch.delenv("KVEDIT_API_KEY", raising=False)
    monkeypatch.setattr(running, "listen", listening)
    monkeypatch.setattr(running, "run", lambda app, place, ready: ready())
    with kv.Store(tmp_path / "memories", durability="none") as store:
        store.put(memories["plain"], "one")
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        words = ("serve", str(tmp_path / "memories"), "--host", host, "--port", "0")
        assert main(list(words)) == 0
        assert ("anybody" in capsys.readouterr().err) == warned
        assert started[-1] == host


@pytest.mark.parametrize(("library", "name"), [("uvicorn", "run"), ("starlette", "create_app")])
def test_a_missing_library_names_the_extra(library, name, monkeypatch):
    from kvedit.serving import openai as package

    module = f"kvedit.serving.openai.{package._LAZY[name]}"
    for loaded in [one for one in sys.modules if one.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(MissingDependency, match=r"kvedit\[serve\]"):
        getattr(package, name)
