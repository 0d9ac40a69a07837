"""Requests as LMCache's own client sends them, and a server that does not answer."""

import threading

import pytest

from kvedit.errors import MissingDependency, TierUnavailable
from kvedit.serving.lmcache import wire as module
from kvedit.serving.lmcache.exporting import _key

msgspec = pytest.importorskip("msgspec", reason="needs the extra lmcache")
zmq = pytest.importorskip("zmq", reason="needs the extra lmcache")

# msgspec_encode of LMCache 0.5.6's own IPCCacheServerKey(model_name="m", world_size=1,
# worker_id=0, token_ids=(1, 200, 70000), start=0, end=3, request_id="r", cache_salt="s",
# num_kv_readers=1).
KEY = (
    "8aaa6d6f64656c5f6e616d65a16daa776f726c645f73697a6501a9776f726b65725f696400a9746f6b656e5f696473"
    "9301ccc8ce00011170a5737461727400a3656e6403aa726571756573745f6964a172aa63616368655f73616c74a173"
    "af726571756573745f636f6e66696773c0ae6e756d5f6b765f7265616465727301"
)


def test_key_is_lmcaches_own():
    key = {**_key("m", (1, 200, 70000), "s"), "request_id": "r"}
    assert module.encode(key).hex() == KEY


def test_every_request_has_a_name_of_its_own():
    names = {_key("m", (1,), "s")["request_id"] for _ in range(50)}
    assert len(names) == 50


@pytest.fixture
def server():
    """A ROUTER that answers what ``replies`` says, and notes what came."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    came, replies, over = [], [], threading.Event()

    def run():
        while not over.is_set():
            if socket.poll(20):
                who, *frames = socket.recv_multipart()
                came.append([module.decode(frame) for frame in frames])
                for reply in replies.pop(0) if replies else []:
                    socket.send_multipart([who, *(reply(frames) if callable(reply) else reply)])

    thread = threading.Thread(target=run)
    thread.start()
    yield f"tcp://127.0.0.1:{port}", came, replies
    over.set()
    thread.join()
    socket.close()
    context.term()


def test_frames_there_and_back(server):
    address, came, replies = server
    replies += [
        [lambda frames: [*frames[:2], module.encode({"a": [1]})]],
        [lambda frames: frames[:2]],
    ]
    with module.Wire(address, 5.0) as wire:
        assert wire.ask("first", {"x": 1}, 2, b"") == {"a": [1]}
        assert wire.ask("second") is None
    assert came == [[1, "first", {"x": 1}, 2, b""], [2, "second"]]


def test_answer_to_an_earlier_request_is_not_taken(server):
    address, _, replies = server
    late = [module.encode(1), module.encode("first"), module.encode("late")]
    replies += [[], [late, lambda frames: [*frames[:2], module.encode("right")]]]
    with module.Wire(address, 0.2) as wire:
        with pytest.raises(TierUnavailable, match=r"did not answer first in 0\.2 s"):
            wire.ask("first")
        assert wire.ask("second") == "right"


def test_without_msgspec(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "msgspec", None)
    with pytest.raises(MissingDependency, match=r"kvedit\[lmcache\]"):
        module.Wire("tcp://127.0.0.1:9", 1.0)
