"""A request has the tokens that kv.generate would feed, and believes receipts alone."""

from types import SimpleNamespace

import pytest
import torch

import kvedit as kv
from kvedit.errors import InvalidArgument, NotFound, NotServed, UnsupportedModel
from kvedit.models.tiny import tiny_model
from kvedit.serving import chat_template, request
from kvedit.serving.outline import outline
from kvedit.serving.template import placeholder

TEXT = "The thing in the box is the answer."
CHAT = [{"role": "user", "content": "What is in the box?"}]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    store = kv.Store(tmp_path_factory.mktemp("requests"))
    memory = kv.capture(*llama, TEXT)
    store.put(memory, "text")
    store.put(kv.editors.Drop(span={"tokens": [2, 5]})(memory), "short")
    store.put(kv.capture(*llama, CHAT), "chat")
    store.put(kv.editors.Emphasize(span={"tokens": [2, 5]}, strength=1.0)(memory), "biased")
    store.put(kv.cartridges.initial.random_vectors(*llama, 9), "cartridge")
    return store


@pytest.mark.parametrize("name", ["text", "short", "chat", "cartridge"])
def test_the_tokens_are_those_of_generate(llama, store, name):
    model, tokenizer = llama
    made = request(store, name, "What then?", tokenizer)
    memory = store.get(name)
    with kv.attach(model, memory, tokenizer) as session:
        session.feed("What then?")
        fed = session.cache.ids[0].tolist()
    assert list(made.prompt_ids[made.slots :]) == fed
    assert made.slots == memory.slots
    assert set(made.prompt_ids[: made.slots]) == {placeholder(tokenizer)[1]}
    assert made.kv_transfer_params == {"memory": store.show(name).record.record}


def test_a_name_that_moves_changes_nothing(llama, tmp_path):
    store = kv.Store(tmp_path)
    first = store.put(kv.capture(*llama, TEXT), "notes")
    made = request(store, "notes", "So?", llama[1])
    store.put(kv.capture(*llama, TEXT + " And more."), "notes")
    assert made.kv_transfer_params["memory"] == first.record
    assert request(store, "notes@{1}", "So?", llama[1]) == made


def test_bodies(llama, store):
    made = request(store, "chat", "And now?", llama[1])
    body = made.completion(max_tokens=3)
    assert body["prompt"] == list(made.prompt_ids) and body["max_tokens"] == 3
    assert made.extra_args == {"kv_transfer_params": body["kv_transfer_params"]}
    chat = made.chat(model="m")
    assert chat["messages"] == [{"role": "user", "content": "And now?"}] and chat["model"] == "m"
    with pytest.raises(InvalidArgument, match="continues a text: make it with chat=True"):
        request(store, "text", "So?", llama[1]).chat()


@pytest.mark.parametrize("name", ["chat", "text", "cartridge"])
def test_the_chat_body_renders_to_the_same_tokens(llama, store, name):
    tokenizer = llama[1]
    made = request(store, name, [{"role": "user", "content": "And now?"}], tokenizer)
    body = made.chat()
    text = tokenizer.apply_chat_template(
        body["messages"], chat_template=chat_template(tokenizer), tokenize=False,
        add_generation_prompt=True, **body["chat_template_kwargs"],
    )  # fmt: skip
    assert tuple(tokenizer.encode(text, add_special_tokens=False)) == made.prompt_ids


def test_placeholders_end_where_the_prompt_begins(llama, store):
    first = placeholder(llama[1])[1]
    made = request(store, "text", [first, 5], llama[1])
    assert made.prompt_ids[made.slots - 1] != first
    assert request(store, "text", [0, 5], None).prompt_ids[0] == 1


def test_what_cannot_be_served_is_refused_at_once(llama, store, tmp_path):
    with pytest.raises(InvalidArgument, match="not log m"):
        request(store, "biased", "So?", llama[1])
    with pytest.raises(NotFound, match="Did you mean text"):
        request(store, "texd", "So?", llama[1])
    with pytest.raises(InvalidArgument, match="prompt is empty"):
        request(store, "text", "", llama[1])
    mistral = tiny_model("mistral")
    other = kv.Store(tmp_path)
    other.put(kv.capture(*mistral, TEXT), "sliding")
    with pytest.raises(UnsupportedModel, match="sliding layer"):
        request(other, "sliding", "So?", mistral[1])
    recipes = kv.Store(tmp_path / "recipes", replay=kv.rebuild)
    plain = kv.capture(*llama, TEXT)
    recipes.put(plain, "plain")
    recipes.put(kv.editors.Drop(span={"tokens": [2, 5]})(plain), "recipe", recipe=True)
    with pytest.raises(InvalidArgument, match="stored as a recipe"):
        request(recipes, "recipe", "So?", llama[1])


def test_an_outline_has_all_but_keys(store):
    record = store.show("biased").record
    found, memory = outline(store, record.record), store.get("biased")
    assert found.model == memory.model and found.next_position == memory.next_position
    for index, layer in memory.layers.items():
        assert torch.equal(found.layers[index].positions, layer.positions)
        assert torch.equal(found.layers[index].bias, layer.bias)
        assert found.layers[index].keys.untyped_storage().nbytes() < layer.keys.nbytes / 2


def test_only_a_receipt_is_believed(llama, store):
    made = request(store, "text", "So?", llama[1])
    receipt = {"memory": made.memory, "slots": made.slots}
    made.check(SimpleNamespace(kv_transfer_params=receipt))
    made.check({"kv_transfer_params": receipt, "choices": [1]})
    for wrong in ({**receipt, "memory": "0" * 64}, {**receipt, "slots": made.slots - 1}):
        with pytest.raises(NotServed, match="receipt names"):
            made.check({"kv_transfer_params": wrong})
    cached = {"usage": {"prompt_tokens_details": {"cached_tokens": made.slots}}}
    for silent in ({}, {**cached, "choices": [1], "object": "text_completion"}):
        with pytest.raises(NotServed, match="nothing says"):
            made.check(silent)


def test_the_end_of_a_stream_counts_cached_tokens(llama, store):
    made = request(store, "text", "So?", llama[1])
    piece = {"object": "chat.completion.chunk", "choices": []}
    for cached, fine in ((made.slots, True), (made.slots - 1, False), (None, False)):
        usage = {"prompt_tokens_details": {"cached_tokens": cached}}
        if fine:
            made.check({**piece, "usage": usage})
            continue
        with pytest.raises(NotServed):
            made.check({**piece, "usage": usage})
