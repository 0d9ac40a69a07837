"""What must not be answered is not: one request ends with an error, and the engine goes on."""

import dataclasses
import shutil

import pytest

import kvedit as kv
from kvedit.serving import request
from tests.serving.vllm.cases import QUESTIONS
from tests.serving.vllm.harness import Ask, Engine, as_request, differences

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def own(place, store, asks, model, tmp_path_factory):
    """A store of its own to damage, with memories that no engine has seen."""
    folder = tmp_path_factory.mktemp("damage") / "memories"
    found = kv.Store(folder)
    for name in ("a-whole", "b-whole", "c-whole"):
        found.put(store.get(name), name)
    whole = store.get("a-whole")
    prints = dataclasses.replace(whole.model.fingerprint, weights="file:" + "0" * 64)
    other = dataclasses.replace(whole.model, fingerprint=prints)
    found.put(dataclasses.replace(whole, model=other), "foreign")
    found.put(kv.editors.Emphasize(span={"tokens": [3, 9]}, strength=1.0)(whole), "biased")
    found.put(whole, "moving")
    return found


@pytest.fixture(scope="module")
def engine(folder, own):
    found = Engine(folder, own.path)
    yield found
    found.close()


def good(engine, asks, expected, name="b-aligned"):
    """The engine is alive, and right, for plain text."""
    plain = asks["b-plain"]
    assert not differences(expected(plain.name), engine.answers([plain])[0])


def refused(engine, ids, params, **options):
    ask = Ask("wrong", tuple(ids), (), params=params)
    output = engine.outputs([ask], **options)[0]
    assert output.outputs[0].finish_reason == "error" and output.finished
    assert list(output.outputs[0].token_ids) == [] and output.kv_transfer_params is None


WRONG = {
    "unknown": lambda ids, n: (ids, {"memory": "nobody"}),
    "a path": lambda ids, n: (ids, {"memory": "../a-whole"}),
    "an absolute path": lambda ids, n: (ids, {"memory": "/etc/passwd"}),
    "an unknown digest": lambda ids, n: (ids, {"memory": "0" * 64}),
    "no text": lambda ids, n: (ids, {"memory": 5}),
    "misspelt": lambda ids, n: (ids, {"memo": "a-whole"}),
    "another model": lambda ids, n: (ids, {"memory": "foreign"}),
    "bias": lambda ids, n: (ids, {"memory": "biased"}),
    "no question": lambda ids, n: (ids[:n], {"memory": "a-whole"}),
    "too short": lambda ids, n: (ids[: n - 9], {"memory": "a-whole"}),
    "one token": lambda ids, n: (ids[:1], {"memory": "a-whole"}),
    "too few placeholders": lambda ids, n: (ids[2:], {"memory": "a-whole"}),
    "too many placeholders": lambda ids, n: (ids[:2] + ids, {"memory": "a-whole"}),
    "the text itself": lambda ids, n: (range(9, 9 + len(ids)), {"memory": "a-whole"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(engine, asks, expected, name):
    ask = asks["a-whole"]
    ids, params = WRONG[name](ask.ids, ask.request.slots)
    refused(engine, ids, params)
    good(engine, asks, expected)


def test_prompt_logprobs(engine, asks, expected):
    ask = asks["a-whole"]
    refused(engine, ask.ids, {"memory": "a-whole"}, prompt_logprobs=1)
    good(engine, asks, expected)


def test_wrong_and_right_in_one_batch(engine, asks, expected):
    right = [asks[name] for name in ("a-whole", "b-whole", "c-whole")]
    wrong = [dataclasses.replace(ask, request=None, params={"memory": "nobody"}) for ask in right]
    mixed = [ask for pair in zip(right, wrong, strict=True) for ask in pair]
    outputs = engine.outputs(mixed)
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["length", "error"] * 3
    for ask, output in zip(right, outputs[::2], strict=True):
        assert tuple(output.outputs[0].token_ids) == expected(ask.name).tokens
        ask.request.check(output)


def test_a_name_that_moves_is_another_memory(engine, own, store, asks, expected, model):
    first = as_request(Ask("a-whole", (), ()), request(own, "moving", QUESTIONS["a"], model[1]))
    by_name = dataclasses.replace(first, params={"memory": "moving"}, request=None)
    assert not differences(expected("a-whole"), engine.answers([by_name])[0])
    own.put(store.get("a-keys-moved"), "moving")
    assert not differences(expected("a-keys-moved"), engine.answers([by_name])[0])
    back = dataclasses.replace(by_name, params={"memory": "moving@{1}"})
    assert not differences(expected("a-whole"), engine.answers([back])[0])
    assert not differences(expected("a-whole"), engine.answers([first])[0])


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_packs(engine, own, store, asks, expected, damage):
    name = {"cut": "damaged-a", "flipped": "damaged-b", "gone": "damaged-c"}[damage]
    memory = kv.editors.Shift(len(damage))(store.get("c-values-moved"))
    own.put(memory, name)
    whole = asks["c-values-moved"]
    (pack,) = own.show(name).packs[-1:]
    (file,) = own.path.rglob(f"{pack}*")
    saved = file.with_suffix(".saved")
    shutil.copyfile(file, saved)
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        if damage == "cut":
            del data[len(data) // 2 :]
        else:
            data[len(data) // 2] ^= 1
        replacement = file.with_suffix(".damaged")
        replacement.write_bytes(data)
        replacement.rename(file)
    refused(engine, whole.ids, {"memory": name})
    good(engine, asks, expected)
    # The same request with the bytes back: nothing of the failure is left over.
    saved.rename(file)
    mended = dataclasses.replace(whole, params={"memory": name}, request=None)
    assert not differences(expected("c-values-moved"), engine.answers([mended])[0])
