"""The worker's half, without vLLM: bytes are checked first, pages are written by the layers."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import kvedit as kv
from kvedit.errors import CorruptMemory, IncompatibleModel, InvalidArgument, UnsupportedModel
from kvedit.models.tiny import tiny_model
from kvedit.serving.vllm.demands import check_engine
from kvedit.serving.vllm.loading import Loader
from kvedit.serving.vllm.matching import ServedModel, fingerprint_of_files
from kvedit.serving.vllm.plans import Load
from kvedit.serving.vllm.writing import layer_order, write

TEXT = "The thing in the box is the answer."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny model, and the model as kv.load gives it."""
    folder = tmp_path_factory.mktemp("files")
    model, tokenizer = tiny_model("llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, kv.load(folder)


@pytest.fixture(scope="module")
def memory(files):
    return kv.capture(*files[1], TEXT)


@pytest.fixture
def store(tmp_path, memory):
    store = kv.Store(tmp_path / "store")
    store.put(memory, "notes")
    store.put(kv.editors.Drop(span={"tokens": [2, 4]})(memory), "short")
    return store


@pytest.fixture
def served_model(files):
    return ServedModel("served", fingerprint_of_files(str(files[0])), torch.float32)


def digest(store, name):
    return store.show(name).record.record


def test_files_have_the_fingerprint_of_their_model(files, memory):
    assert fingerprint_of_files(str(files[0])) == memory.model.fingerprint
    with pytest.raises(InvalidArgument, match="to tell the model by"):
        folder = files[0].parent / "bare"
        folder.mkdir()
        fingerprint_of_files(str(folder))


def test_slots_come_as_pages_take_them(store, served_model, memory):
    loader = Loader(store, served_model)
    found = loader.load(digest(store, "notes"))
    assert torch.equal(found.keys[1], memory.layers[1].keys.transpose(0, 1))
    assert torch.equal(found.values[2], memory.layers[2].values.transpose(0, 1))
    assert found.slots == memory.slots and loader.load(digest(store, "notes")) is found


def test_the_least_recent_goes(store, served_model):
    loader = Loader(store, served_model, capacity=1)
    first = loader.load(digest(store, "notes"))
    loader.load(digest(store, "short"))
    assert loader.load(digest(store, "notes")) is not first
    roomy = Loader(store, served_model, capacity=1 << 30)
    assert roomy.load(digest(store, "short")) is roomy.load(digest(store, "short"))


def test_other_dtypes(store, served_model):
    store.put(store.get("notes", dtype=torch.bfloat16), "half")
    half = Loader(store, served_model).load(digest(store, "half"))
    assert half.keys[0].dtype == torch.float32
    with pytest.raises(IncompatibleModel, match="dtype"):
        Loader(store, dataclasses.replace(served_model, dtype=torch.bfloat16)).load(
            digest(store, "notes")
        )
    with pytest.raises(InvalidArgument, match="serves nothing unchecked"):
        Loader(store, served_model, verify="off")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.parametrize("verify", ["full", "deep", "fast"])
def test_damaged_packs_are_not_loaded(store, served_model, damage, verify):
    (pack,) = store.path.rglob(f"{store.show('notes').packs[0]}*")
    data = bytearray(pack.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    with pytest.raises(CorruptMemory):
        Loader(kv.Store(store.path), served_model, verify).load(digest(store, "notes"))


class Layer(SimpleNamespace):
    """An attention layer of an engine that keeps what it is given."""

    def __init__(self, heads, size):
        super().__init__(num_kv_heads=heads, head_size=size, kv_cache=torch.zeros(1), impl=self)
        self.written = {}

    def do_kv_cache_update(self, layer, key, value, cache, places):
        assert layer is self and cache is self.kv_cache and places.dtype == torch.int64
        rows = zip(places.tolist(), key, value, strict=True)
        self.written |= {place: (k, v) for place, k, v in rows}


def test_every_slot_goes_to_its_place(store, served_model, memory):
    loaded = Loader(store, served_model).load(digest(store, "notes"))
    names = [f"model.layers.{index}.self_attn.attn" for index in (2, 0, 1)]
    order = layer_order(names)
    assert order == sorted(names)
    layers = {name: Layer(2, 16) for name in names}
    load = Load("x", loaded.slots, 3, (9, 4, 6, 1))
    write(layers, order, loaded, 3, load.places(4))
    for index, name in enumerate(order):
        assert len(layers[name].written) == loaded.slots - 3
        for slot in range(3, loaded.slots):
            key, value = layers[name].written[(9, 4, 6, 1)[slot // 4] * 4 + slot % 4]
            assert torch.equal(key, memory.layers[index].keys[:, slot])
            assert torch.equal(value, memory.layers[index].values[:, slot])


def test_pages_that_are_touched():
    load = Load("x", slots=9, start=4, blocks=(9, 4, 6, 2))
    assert load.touched(4) == {4, 6}
    assert Load("x", 8, 0, (9, 4, 6)).touched(4) == {9, 4}


def test_another_shape_writes_nothing(store, served_model):
    loaded = Loader(store, served_model).load(digest(store, "notes"))
    names = [f"layers.{index}" for index in range(3)]
    layers = {name: Layer(2, 16) for name in names[:2]} | {names[2]: Layer(1, 16)}
    places = torch.arange(loaded.slots)
    with pytest.raises(InvalidArgument, match=r"layers.2 has 1 KV heads of 16 dims"):
        write(layers, names, loaded, 0, places)
    with pytest.raises(InvalidArgument, match="2 layers"):
        write(layers, names[:2], loaded, 0, places)
    assert not any(layer.written for layer in layers.values())


@pytest.mark.parametrize("names", [["a.0.b.1"], ["a", "b"], ["a.0", "b.0"], ["a.1", "a.2"]])
def test_layers_that_cannot_be_told_apart(names):
    with pytest.raises(InvalidArgument, match="which layer is which"):
        layer_order(names)


def engine(**changes):
    """vLLM's configuration, as far as it is looked at, with everything right."""
    parts = {
        "kv_transfer_config": {"kv_role": "kv_consumer", "kv_load_failure_policy": "fail"},
        "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1},
        "load_config": {"load_format": "auto"},
        "model_config": {
            "hf_overrides": {}, "quantization": None, "use_mla": False, "dtype": torch.float32,
            "hf_config": SimpleNamespace(),
        },
        "cache_config": {"cache_dtype": "auto"},
    }  # fmt: skip
    flat = {"speculative_config": None, "use_v2_model_runner": False}
    for name, value in changes.items():
        if name in flat:
            flat[name] = value
        else:
            next(part for part in parts.values() if name in part)[name] = value
    return SimpleNamespace(**{k: SimpleNamespace(**v) for k, v in parts.items()}, **flat)


class FullAttentionSpec(SimpleNamespace):
    sliding_window = None
    attention_chunk_size = None


class MLAAttentionSpec(FullAttentionSpec):
    pass


def pages(*specs):
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    return SimpleNamespace(kv_cache_groups=groups)


def test_an_engine_that_is_right():
    check_engine(engine(), pages(FullAttentionSpec()))
    check_engine(engine(cache_dtype="float32"), pages(FullAttentionSpec()))


@pytest.mark.parametrize(
    ("changes", "specs", "says"),
    [
        ({"kv_role": "kv_both"}, [FullAttentionSpec()], "expected kv_consumer"),
        ({"kv_load_failure_policy": "recompute"}, [FullAttentionSpec()], "placeholders"),
        ({"tensor_parallel_size": 2}, [FullAttentionSpec()], "tensor_parallel_size is 2"),
        ({"pipeline_parallel_size": 2}, [FullAttentionSpec()], "pipeline_parallel_size is 2"),
        ({"speculative_config": 1}, [FullAttentionSpec()], "speculative"),
        ({"use_v2_model_runner": True}, [FullAttentionSpec()], "V2"),
        ({"hf_overrides": {"x": 1}}, [FullAttentionSpec()], "hf_overrides"),
        ({"load_format": "dummy"}, [FullAttentionSpec()], "dummy"),
        ({"quantization": "fp8"}, [FullAttentionSpec()], "quantization is fp8"),
        ({"use_mla": True}, [FullAttentionSpec()], "latents"),
        ({"cache_dtype": "fp8"}, [FullAttentionSpec()], "kv_cache_dtype is fp8"),
        ({}, [FullAttentionSpec(), FullAttentionSpec()], "2 groups"),
        ({}, [MLAAttentionSpec()], "MLAAttentionSpec"),
        ({}, [FullAttentionSpec(sliding_window=8)], "sliding_window 8"),
        ({}, [FullAttentionSpec(attention_chunk_size=8)], "attention_chunk_size 8"),
    ],
)
def test_engines_that_are_refused(changes, specs, says):
    with pytest.raises(UnsupportedModel, match=says):
        check_engine(engine(**changes), pages(*specs))
