"""What a server says of itself decides whether, and in which layout, it is written to."""

import copy

import pytest
import torch

from kvedit.errors import InvalidArgument, TierUnavailable, UnsupportedModel
from kvedit.serving.lmcache import server as module
from kvedit.serving.lmcache.server import Server

URL = "http://127.0.0.1:8080"
SAID = {
    "version": "0.5.6-g3e11e108",
    "config": {
        "mp": {
            "transport": "zmq",
            "port": 5555,
            "chunk_size": 256,
            "engine_type": "default",
            "supported_transfer_mode": "auto",
            "shm_name": "pool",
        }
    },
    "status": {"cache_context_meta": {}, "non_cuda_context_meta": {}},
}
GROUP = {"dtype": "torch.bfloat16", "engine_kv_format": "NL_X_NB_NH_BS_CS"}
GPU = {"model_name": "m", "world_size": 1, "kv_cache_layout": {"kernel_groups": [GROUP]}}
CPU = {"model_name": "m", "world_size": 1, "block_size": 32, "use_mla": True}


@pytest.fixture
def said(monkeypatch):
    answers = copy.deepcopy(SAID)
    monkeypatch.setattr(module, "_read", lambda url, path, timeout: answers[path])
    return answers


def test_found_by_its_http_endpoint(said):
    server = Server.at(URL, 1.0)
    assert (server.address, server.chunk) == ("tcp://127.0.0.1:5555", 256)


@pytest.mark.parametrize("url", ["lm://localhost:65432", "127.0.0.1:8080", ""])
def test_other_urls_are_refused(url):
    with pytest.raises(InvalidArgument, match="HTTP endpoint"):
        Server.at(url, 1.0)


def test_nobody_there():
    with pytest.raises(TierUnavailable, match="no LMCache server answers at"):
        Server.at("http://127.0.0.1:9", 1.0)


def test_other_versions_are_refused(said):
    said["version"] = "0.5.7"
    with pytest.raises(UnsupportedModel, match=r"tested with LMCache 0\.5\.6.*runs 0\.5\.7"):
        Server.at(URL, 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transport", "grpc"),
        ("supported_transfer_mode", "lmcache_driven"),
        ("shm_name", ""),
        ("engine_type", "blend"),
    ],
)
def test_a_server_that_takes_no_exports_is_told_how_to_start(said, name, value):
    said["config"]["mp"][name] = value
    with pytest.raises(TierUnavailable, match=rf"has {name} '{value}': start it with"):
        Server.at(URL, 1.0)


def layout(status, name=None, dtype=torch.bfloat16, block=0):
    return Server("", 256, status).layout("m", dtype, name, block)


def test_layout_is_the_registered_engines():
    assert layout({"cache_context_meta": {"1": GPU, "2": GPU}}).name == "packed"
    two = {**GPU, "kv_cache_layout": {"kernel_groups": [{**GROUP, "engine_kv_format":
           "NL_X_NB_TWO_NH_BS_HS"}]}}  # fmt: skip
    assert layout({"cache_context_meta": {"1": two}}).name == "split"
    both = {"cache_context_meta": {"1": GPU, "2": two}}
    with pytest.raises(InvalidArgument, match="expected one"):
        layout(both)


def test_layout_without_an_engine_must_be_said():
    other = {"cache_context_meta": {"1": {**GPU, "model_name": "n"}}}
    with pytest.raises(InvalidArgument, match="no engine on a GPU is registered for m"):
        layout(other)
    assert layout(other, "split").name == "split"


def test_layout_that_contradicts_the_engine_is_refused():
    with pytest.raises(InvalidArgument, match=r"registered with layouts \['packed'\]"):
        layout({"cache_context_meta": {"1": GPU}}, "split")


def test_dtype_is_the_engines():
    with pytest.raises(InvalidArgument, match=r"memory\.to\(dtype=torch\.bfloat16\)"):
        layout({"cache_context_meta": {"1": GPU}}, dtype=torch.float32)


def test_several_workers_or_kinds_of_layers_are_refused():
    with pytest.raises(InvalidArgument, match="over 2 workers"):
        layout({"cache_context_meta": {"1": {**GPU, "world_size": 2}}})
    mixed = {"kernel_groups": [GROUP, {**GROUP, "engine_kv_format": "NL_X_NB_BS_NH_CS"}]}
    with pytest.raises(InvalidArgument, match="in 2 groups"):
        layout({"cache_context_meta": {"1": {**GPU, "kv_cache_layout": mixed}}})


def test_cpu_engine_says_the_size_of_its_pages():
    status = {"non_cuda_context_meta": {"1": CPU}}
    assert layout(status, "vllm-cpu", torch.float32).block == 32
    assert layout(status, "vllm-cpu", torch.float32, 128).block == 128
    with pytest.raises(InvalidArgument, match="start the engine before the export"):
        layout({}, "vllm-cpu", torch.float32)
    with pytest.raises(InvalidArgument, match="expected float32"):
        layout(status, "vllm-cpu", torch.bfloat16)
