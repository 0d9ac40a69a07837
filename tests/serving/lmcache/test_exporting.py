"""Exports to a real LMCache server in its own process, read by LMCache's own client in a third."""

import dataclasses
import json
import zlib

import pytest
import torch
from safetensors.torch import load_file

import kvedit as kv
from kvedit.errors import CorruptMemory, InvalidArgument, TierUnavailable
from kvedit.models.tiny import tiny_model
from kvedit.serving.lmcache import exporting as module
from kvedit.serving.lmcache import to_lmcache
from kvedit.serving.lmcache.chunks import chunked
from kvedit.serving.lmcache.layouts import Layout
from kvedit.testing.steering import random_delta
from tests.serving.lmcache.conftest import started

pytest.importorskip("msgspec", reason="needs the extra lmcache")
pytest.importorskip("zmq", reason="needs the extra lmcache")
pytestmark = pytest.mark.slow

SIZE = 256

# LMCache's client: looks tokens up under a salt, and gives what it finds.
READ = """
import json, sys, uuid, dataclasses, torch, zmq
from safetensors.torch import save_file
from lmcache.v1.distributed.api import MemoryLayoutDesc
from lmcache.v1.multiprocess.custom_types import (
    IPCCacheServerKey, RegisterEngineDrivenContextPayload)
from lmcache.v1.multiprocess.transfer_context.base import (
    EngineDrivenContextMetadata, create_engine_driven_context)
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory
from lmcache.sdk.wrapper.contiguous import ContiguousTransferWrapper

ask = json.loads(sys.argv[1])
client = RequestClientFactory.create(ask["url"], context=zmq.Context())
shape, dtype = torch.Size(ask["shape"]), getattr(torch, ask["dtype"])
instance = 4711
told = client.register_kv_cache_engine_driven_context(RegisterEngineDrivenContextPayload(
    instance_id=instance, model_name=ask["model"], world_size=1, block_size=256,
    num_layers=shape[-3], hidden_dim_size=shape[-1], dtype_str=ask["dtype"],
    use_mla=len(shape) == 3, num_physical_slots=256)).result(timeout=20)
meta = EngineDrivenContextMetadata(MemoryLayoutDesc([shape], [dtype]), 256, len(shape) == 3)
context = create_engine_driven_context(meta, client, 20.0, told.shm_name, told.pool_size)
found = {}
for salt in ask["salts"]:
    key = IPCCacheServerKey(ask["model"], 1, 0, tuple(ask["tokens"]), 0, len(ask["tokens"]),
                            uuid.uuid4().hex, salt, None, 1)
    client.lookup(key.no_worker_id_version(), 1).result(timeout=20)
    hits = client.wait_prefetch_status(key.request_id, 10.0).result(timeout=20)
    if hits:
        part = dataclasses.replace(key, end=hits * 256)
        chunks = ContiguousTransferWrapper(context, 256).retrieve(part, instance)
        found[salt or "none"] = chunks.clone()
    client.end_session(key.request_id).result(timeout=20)
save_file(found or {"nothing": torch.zeros(1)}, ask["out"])
client.unregister_kv_cache_engine_driven_context(instance).result(timeout=20)
client.close()
"""

# LMCache's gathering from, and scattering to, pages as engines have them.
PAGES = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from lmcache.v1.gpu_connector.utils import LayoutHints
from lmcache.v1.multiprocess.transfer_context.base import gather_paged_kv_to_cpu

given = load_file(sys.argv[1])
keys, values = given["keys"], given["values"]  # layer, head, token, dim
layers, heads, tokens, dim = keys.shape
size, order = 32, [5, 2, 8, 0, 3, 7, 1, 4]
out = {}
for kind in ("packed", "split"):
    pages = {}
    for layer in range(layers):
        if kind == "packed":
            page = torch.full((9, heads, size, 2 * dim), -1.0)
        else:
            page = torch.full((9, 2, heads, size, dim), -1.0)
        for number, block in enumerate(order):
            part = slice(number * size, (number + 1) * size)
            k, v = keys[layer][:, part], values[layer][:, part]
            page[block] = torch.cat((k, v), -1) if kind == "packed" else torch.stack((k, v))
        pages[f"layer.{layer}"] = page
    width = 2 * dim if kind == "packed" else dim
    hints = LayoutHints(kv_layout="HND", num_kv_heads=heads, tokens_per_block=size, head_dim=width)
    out[kind] = gather_paged_kv_to_cpu(pages, order, len(order), layout_hints=hints)[0].clone()
save_file(out, sys.argv[2])
"""


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama")


@pytest.fixture
def memory(tiny, request):
    torch.manual_seed(zlib.crc32(request.node.name.encode()))  # no test finds another's chunks
    return kv.capture(*tiny, torch.randint(3, 90, (2 * SIZE,)).tolist())


def edited(tiny, memory):
    delta = random_delta(*tiny, scale=0.2).operand()
    return kv.editors.Steer(values=1.0, at="all")(memory, delta)


def whole(memory, layout):
    cut = chunked(memory, SIZE)
    parts = [Layout(layout).payload(*cut.chunk(index)) for index in range(cut.count)]
    return torch.cat(parts, dim=-2)


def read(lmcache, place, memory, model, layout, salts):
    payload = whole(memory, layout)
    shape = [*payload.shape[:-2], SIZE, payload.shape[-1]]
    ask = {
        "url": f"tcp://127.0.0.1:{lmcache.port}",
        "model": model,
        "shape": shape,
        "dtype": str(payload.dtype).removeprefix("torch."),
        "tokens": memory.tokens.tolist(),
        "salts": salts,
        "out": str(place / "found.safetensors"),
    }
    lmcache.python(READ, json.dumps(ask))
    return load_file(ask["out"])


@pytest.mark.parametrize("layout", ["packed", "split"])
def test_lmcaches_client_finds_each_edit_under_its_salt_alone(
    lmcache, tiny, memory, tmp_path, layout
):
    other, model = edited(tiny, memory), f"tiny-{layout}"
    for one in (memory, other):
        done = to_lmcache(one, lmcache.url, model, layout=layout)
        assert (done.salt, done.slots, done.tail, done.written) == (one.digest, 512, 0, 2)
    salts = [memory.digest, other.digest, "", "0" * 64]
    found = read(lmcache, tmp_path, memory, model, layout, salts)
    assert set(found) == {memory.digest, other.digest}
    assert torch.equal(found[memory.digest], whole(memory, layout))
    assert torch.equal(found[other.digest], whole(other, layout))
    assert not torch.equal(found[memory.digest], found[other.digest])


def test_half_precision_and_tail(lmcache, tiny, tmp_path):
    ids = torch.randint(3, 90, (300,)).tolist()
    memory = kv.capture(*tiny, ids).to(dtype=torch.bfloat16)
    done = to_lmcache(memory, lmcache.url, "tiny-half", layout="packed")
    assert (done.slots, done.tail, done.written) == (256, 44, 1)
    found = read(lmcache, tmp_path, memory, "tiny-half", "packed", [done.salt])
    assert torch.equal(found[done.salt], whole(memory, "packed"))
    body = done.completion([7, 8], max_tokens=3)
    assert body == {"prompt": [*ids, 7, 8], "cache_salt": memory.digest, "max_tokens": 3}


def test_again_writes_nothing_and_a_longer_memory_its_own(lmcache, memory):
    assert to_lmcache(memory, lmcache.url, "tiny-again", layout="split").written == 2
    assert to_lmcache(memory, lmcache.url, "tiny-again", layout="split").written == 0


def test_other_bits_under_the_digest_are_found(lmcache, tiny, memory, monkeypatch):
    def under_a_wrong_name(*arguments):
        cut = chunked(*arguments)
        plain = dataclasses.replace(cut.plain, digest=memory.digest)
        return dataclasses.replace(cut, plain=plain)

    with monkeypatch.context() as patch:
        patch.setattr(module, "chunked", under_a_wrong_name)
        to_lmcache(edited(tiny, memory), lmcache.url, "tiny-other", layout="packed")
    with pytest.raises(CorruptMemory, match=r"other bits in chunks \[0, 1\]"):
        to_lmcache(memory, lmcache.url, "tiny-other", layout="packed")
    lmcache.post("cache/clear")
    assert to_lmcache(memory, lmcache.url, "tiny-other", layout="packed").written == 2


def test_chunks_that_are_gone_are_missed(lmcache, memory, monkeypatch):
    write = module._Writer.write

    def then_lost(self):
        write(self)
        lmcache.post("cache/clear")

    monkeypatch.setattr(module._Writer, "write", then_lost)
    with pytest.raises(TierUnavailable, match="holds 0 of 2 chunks"):
        to_lmcache(memory, lmcache.url, "tiny-gone", layout="packed")


def test_no_room(lmcache, smollm, tmp_path):
    memory = kv.capture(*smollm, list(range(100, 100 + SIZE)))  # 11.8 MB in float32
    with started(lmcache.folder, tmp_path, "--l1-size-gb", "0.01") as small:
        with pytest.raises(TierUnavailable, match=r"holds 0 of 1 chunks: it has no room"):
            to_lmcache(memory, small.url, "smollm", layout="packed")


def test_a_bit_that_flips_on_the_way_is_found(lmcache, memory, monkeypatch):
    write = module.Pool.write

    def flipped(self, place, payload):
        wrong = payload.clone()
        wrong.view(torch.int32).view(-1)[-1] ^= 1
        write(self, place, wrong)

    monkeypatch.setattr(module.Pool, "write", flipped)
    with pytest.raises(CorruptMemory, match="other bits"):
        to_lmcache(memory, lmcache.url, "tiny-flip", layout="packed")


def test_another_layout_of_the_same_model_is_refused(lmcache, memory):
    to_lmcache(memory, lmcache.url, "tiny-two", layout="packed")
    with pytest.raises(CorruptMemory, match="another layout"):
        to_lmcache(memory, lmcache.url, "tiny-two", layout="split")


def test_layouts_are_what_lmcache_makes_of_pages(lmcache, memory, tmp_path):
    from safetensors.torch import save_file

    keys, values = chunked(memory, SIZE).chunk(0)
    save_file({"keys": keys, "values": values}, tmp_path / "given.safetensors")
    lmcache.python(PAGES, str(tmp_path / "given.safetensors"), str(tmp_path / "made.safetensors"))
    made = load_file(tmp_path / "made.safetensors")
    for layout in ("packed", "split"):
        assert torch.equal(made[layout], Layout(layout).payload(keys, values))


def test_without_a_layout_the_engine_is_asked(lmcache, memory):
    with pytest.raises(InvalidArgument, match="no engine on a GPU is registered for nobody"):
        to_lmcache(memory, lmcache.url, "nobody")
    with pytest.raises(InvalidArgument, match="without @"):
        to_lmcache(memory, lmcache.url, "a@b", layout="packed")
