"""The scheduler's half, without vLLM: who gets which slots, who is refused, what is kept apart."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import kvedit as kv
from kvedit.models.tiny import tiny_model
from kvedit.serving.vllm.catalogue import Catalogue
from kvedit.serving.vllm.matching import ServedModel
from kvedit.serving.vllm.plans import Load
from kvedit.serving.vllm.scheduling import Scheduling

TEXT = "The thing in the box is the answer."


@pytest.fixture(scope="module")
def memory():
    model, tokenizer = tiny_model("llama")
    found = kv.capture(model, tokenizer, TEXT)
    # As if the model had been loaded from files.
    prints = dataclasses.replace(found.model.fingerprint, weights="file:1")
    return dataclasses.replace(found, model=dataclasses.replace(found.model, fingerprint=prints))


@pytest.fixture
def store(tmp_path, memory):
    store = kv.Store(tmp_path)
    store.put(memory, "notes")
    return store


@pytest.fixture
def desk(store, memory):
    model = ServedModel("served", memory.model.fingerprint, torch.float32)
    return Scheduling(Catalogue(store, model))


class Asked(SimpleNamespace):
    """A request as vLLM has it."""

    def __init__(self, name="one", ids=(), params=None, **options):
        sampling = SimpleNamespace(prompt_logprobs=options.pop("prompt_logprobs", None))
        nothing = {"prompt_embeds": None, "mm_features": [], "lora_request": None}
        super().__init__(
            request_id=name, prompt_token_ids=list(ids), kv_transfer_params=params,
            sampling_params=sampling, cache_salt=None, block_hashes=["old"], resumable=False,
            skip_reading_prefix_cache=sampling.prompt_logprobs is not None,
            **{**nothing, **options},
        )  # fmt: skip

    def update_block_hashes(self):
        self.block_hashes.append(self.cache_salt)


def asked(memory, name="one", ref="notes", **options):
    ids = options.pop("ids", [0] * memory.slots + [5, 6])
    return Asked(name, ids, {"memory": ref}, **options)


def refused(desk, request):
    return desk.wanted(request, 0) == (1, True)


def test_a_plain_request_is_left_alone(desk):
    request = Asked(ids=[1, 2, 3])
    desk.arrive(request)
    assert (request.cache_salt, request.block_hashes) == (None, ["old"])
    assert desk.wanted(request, 0) == (0, False)
    desk.allocated(request, [4], 0)
    assert desk.step().loads == () and desk.leave(request) is None


def test_a_memory_is_planned_and_receipted(desk, store, memory):
    request = asked(memory)
    request.cache_salt = "tenant"
    desk.arrive(request)
    digest = store.show("notes").record.record
    assert request.block_hashes == [f"kvedit:{digest}:tenant"]
    assert desk.wanted(request, 4) == (memory.slots - 4, False)
    desk.allocated(request, [7, 3], memory.slots - 4)
    assert desk.step().loads == (Load(digest, memory.slots, 4, (7, 3)),)
    assert desk.step().loads == ()
    # After a preemption the same again.
    desk.wanted(request, 0)
    desk.allocated(request, [1, 2], memory.slots)
    assert desk.step().loads[0].start == 0
    assert desk.leave(request) == {"memory": digest, "slots": memory.slots}
    assert desk.leave(request) is None


def test_no_receipt_where_vllm_computed_slots(desk, memory):
    request = asked(memory)
    desk.arrive(request)
    desk.wanted(request, 0)
    desk.allocated(request, [1], 0)
    assert desk.leave(request) is None


def test_no_load_where_the_prefix_cache_has_all(desk, memory):
    request = asked(memory)
    desk.arrive(request)
    assert desk.wanted(request, memory.slots + 1) == (0, False)
    desk.allocated(request, [1], 0)
    assert desk.step().loads == () and desk.leave(request) is not None


def test_versions_have_salts_of_their_own(desk, store, memory):
    desk.arrive(first := asked(memory))
    store.put(kv.editors.Shift(3)(memory), "notes")
    desk.arrive(second := asked(memory, "two"))
    desk.arrive(third := asked(memory, "three", "notes@{1}"))
    assert first.cache_salt == third.cache_salt != second.cache_salt


@pytest.mark.parametrize("ref", ["nobody", "../notes", "", "a" * 64, None, 3, ["notes"]])
def test_references_that_mean_nothing(desk, memory, ref, caplog):
    request = asked(memory, ref=ref)
    desk.arrive(request)
    assert refused(desk, request) and "request one is refused" in caplog.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n: {"ids": [0] * n}, "and one token more"),
        (lambda n: {"ids": [0] * (n - 3)}, "and one token more"),
        (lambda n: {"ids": [0]}, "has 1 tokens"),
        (lambda n: {"ids": [0] * (n + 2)}, "begins with"),
        (lambda n: {"ids": [0] * (n + 2) + [5]}, "placeholders (equal token ids"),
        (lambda n: {"ids": [0] * (n - 2) + [5, 6, 7, 8]}, "placeholders (equal token ids"),
        (lambda n: {"prompt_logprobs": 1}, "prompt_logprobs"),
        (lambda n: {"mm_features": [1]}, "images"),
        (lambda n: {"lora_request": 1}, "LoRA"),
        (lambda n: {"prompt_embeds": 1}, "embeddings"),
    ],
)
def test_requests_that_do_not_fit(desk, memory, change, says, caplog):
    request = asked(memory, **change(memory.slots))
    desk.arrive(request)
    assert refused(desk, request)
    assert len(caplog.records) == 1 and says in caplog.text
    assert not request.skip_reading_prefix_cache
    desk.allocated(request, [1], 1)
    assert desk.step().refused == ("one",)
    assert desk.leave(request) is None and desk.wanted(request, 0) == (0, False)


def test_refused_requests_share_nothing(desk, memory):
    requests = [asked(memory, name, "nobody") for name in ("one", "two")]
    for request in requests:
        desk.arrive(request)
    assert requests[0].cache_salt != requests[1].cache_salt


@pytest.mark.parametrize("params", [{"memo": "notes"}, {"memory": "notes", "do_remote": 1}, "x"])
def test_parameters_that_are_not_ours(desk, memory, params):
    request = Asked(ids=[0] * memory.slots + [5], params=params)
    desk.arrive(request)
    assert refused(desk, request) and request.kv_transfer_params != "x"


def test_what_a_record_is_is_found_out_once(desk, store, memory, monkeypatch):
    desk.arrive(asked(memory))
    monkeypatch.setattr(store, "get", None)  # not one byte more is read
    monkeypatch.setattr(store, "peek", None)
    request = asked(memory, "two")
    desk.arrive(request)
    assert not refused(desk, request)


def test_damage_is_not_remembered(desk, store, memory, monkeypatch):
    def broken(*args, **options):
        raise kv.errors.CorruptMemory("torn")

    with monkeypatch.context() as patch:
        patch.setattr(store, "get", broken)
        desk.arrive(first := asked(memory))
    desk.arrive(second := asked(memory, "two"))
    assert refused(desk, first) and not refused(desk, second)


@pytest.mark.parametrize(
    ("field", "value"),
    [("weights", "file:2"), ("config", "other"), ("tokenizer", "other"), ("adapters", "other")],
)
def test_memories_of_another_model(store, memory, field, value, caplog):
    other = dataclasses.replace(memory.model.fingerprint, **{field: value})
    desk = Scheduling(Catalogue(store, ServedModel("served", other, torch.float32)))
    desk.arrive(request := asked(memory))
    assert refused(desk, request) and f"{field} fingerprint: memory" in caplog.text


def test_memories_that_would_be_rounded(store, memory, caplog):
    model = ServedModel("served", memory.model.fingerprint, torch.bfloat16)
    desk = Scheduling(Catalogue(store, model))
    desk.arrive(request := asked(memory))
    assert refused(desk, request) and "dtype: memory torch.float32, server" in caplog.text


def test_memories_of_live_weights(tmp_path, caplog):
    model, tokenizer = tiny_model("llama")
    found = kv.capture(model, tokenizer, TEXT)
    store = kv.Store(tmp_path)
    store.put(found, "notes")
    desk = Scheduling(
        Catalogue(store, ServedModel("served", found.model.fingerprint, torch.float32))
    )
    desk.arrive(request := asked(found))
    assert refused(desk, request) and "told by its live tensors" in caplog.text
