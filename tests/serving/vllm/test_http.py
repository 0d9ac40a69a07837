"""Over HTTP, through the command as kvedit writes it: completions, chats, streams, refusals."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import kvedit as kv
from kvedit.errors import NotServed
from kvedit.serving import request
from kvedit.serving.vllm import vllm_command
from tests.serving.vllm.harness import ENVIRONMENT, Ask, said_by_hf

pytestmark = pytest.mark.vllm

STEPS = 24
TALK = [
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": "The red key opens the shed. The blue key opens the attic."},
    {"role": "assistant", "content": "Good to know."},
]


class Server:
    """vLLM's own server in a process."""

    def __init__(self, words, log):
        environment = {**os.environ, **ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=file, env=environment)

    def url(self, port):
        self.base = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text()[-3000:])
            try:
                urllib.request.urlopen(f"{self.base}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(1)
        raise TimeoutError(self.log.read_text()[-3000:])

    def post(self, path, body):
        data = json.dumps(body).encode()
        asked = urllib.request.Request(
            f"{self.base}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return json.loads(answer.read())

    def stream(self, path, body):
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        asked = urllib.request.Request(
            f"{self.base}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=120) as answer:
            lines = [line.decode().strip() for line in answer]
        pieces = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [json.loads(piece) for piece in pieces if piece != "[DONE]"]

    def metric(self, name, source):
        with urllib.request.urlopen(f"{self.base}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found = [line for line in lines if line.startswith(name) and f'source="{source}"' in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


@pytest.fixture(scope="module")
def talk(store, model):
    """A memory of a chat."""
    memory = kv.capture(*model, TALK)
    store.put(memory, "talk")
    return memory


@pytest.fixture(scope="module")
def server(place, folder, model, asks, talk, tmp_path_factory):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = vllm_command(
        place, folder, tokenizer=model[1], python=sys.executable, port=port, host="127.0.0.1",
        dtype="float32", max_model_len=1024, served_model_name="served",
        arguments=("--enforce-eager", "--block-size", "32"),
    )  # fmt: skip
    found = Server(words, tmp_path_factory.mktemp("server") / "log")
    yield found.url(port)
    found.process.terminate()
    found.process.wait(60)


OPTIONS = {"model": "served", "max_tokens": STEPS, "temperature": 0, "ignore_eos": True}


def text_of(model, tokens):
    return model[1].decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["a-whole", "b-knorm", "c-steered", "cartridge-96"])
def test_completions(server, asks, expected, model, name):
    made = asks[name].request
    before = server.metric("vllm:prompt_tokens_by_source_total", "external_kv_transfer")
    answer = server.post("/v1/completions", made.completion(**OPTIONS))
    assert answer["choices"][0]["text"] == text_of(model, expected(name).tokens)
    made.check(answer)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == made.slots
    after = server.metric("vllm:prompt_tokens_by_source_total", "external_kv_transfer")
    assert after - before == made.slots


def test_a_completion_as_a_stream(server, asks, expected, model):
    made = asks["b-no-values"].request
    pieces = server.stream("/v1/completions", made.completion(**OPTIONS))
    text = "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"])
    assert text == text_of(model, expected("b-no-values").tokens)
    made.check(pieces[-1])


@pytest.mark.parametrize("name", ["talk", "a-whole", "cartridge-96"])
def test_chats(server, store, model, talk, name):
    question = [{"role": "user", "content": "Which key opens the attic?"}]
    made = request(store, name, question, model[1])
    ask = Ask(name, (), made.prompt_ids[made.slots :], store.get(name))
    wanted = text_of(model, said_by_hf(model[0], ask).tokens)
    answer = server.post("/v1/chat/completions", made.chat(**OPTIONS))
    assert answer["choices"][0]["message"]["content"] == wanted
    assert answer["usage"]["prompt_tokens"] == len(made.prompt_ids)
    made.check(answer)
    pieces = server.stream("/v1/chat/completions", made.chat(**OPTIONS))
    deltas = [piece["choices"][0]["delta"] for piece in pieces if piece["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == wanted
    made.check(pieces[-1])


def test_a_plain_chat_is_as_ever(server, model):
    question = [{"role": "user", "content": "Name a colour."}]
    ids = model[1].apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    wanted = said_by_hf(model[0], Ask("plain", tuple(ids), ()))
    answer = server.post("/v1/chat/completions", {**OPTIONS, "messages": question})
    assert answer["choices"][0]["message"]["content"] == text_of(model, wanted.tokens)


def test_refusals_are_errors(server, asks, expected, model):
    made = asks["a-whole"].request
    wrong = {**made.completion(**OPTIONS), "kv_transfer_params": {"memory": "nobody"}}
    with pytest.raises(urllib.error.HTTPError) as failed:
        server.post("/v1/completions", wrong)
    assert failed.value.code == 500
    pieces = server.stream("/v1/completions", wrong)
    assert "error" in pieces[-1]
    assert "has no memory 'nobody'" in server.log.read_text()
    answer = server.post("/v1/completions", made.completion(**OPTIONS))
    assert answer["choices"][0]["text"] == text_of(model, expected("a-whole").tokens)


def test_the_check_finds_a_memory_that_was_left_out(server, asks):
    made = asks["a-whole"].request
    body = {**made.completion(**OPTIONS), "kv_transfer_params": None}
    for _ in range(2):  # the second time, all is cached
        with pytest.raises(NotServed, match="nothing says"):
            made.check(server.post("/v1/completions", body))
