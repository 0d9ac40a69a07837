"""Memories over the same tokens never meet, nor does plain text; and the checks can fail."""

import dataclasses
import os

import pytest

from tests.serving.vllm.harness import Ask, Engine, differences, said_by_hf
from tests.serving.vllm.mutants import FILE, MODES

pytestmark = pytest.mark.vllm

ALIKE = ("a-whole", "a-no-values", "a-keys-moved", "a-values-moved", "a-steered", "a-compiled")
JUDGED = ("a-whole", "b-keys-moved", "b-knorm", "c-unaligned", "cartridge-96")


@pytest.fixture(scope="module")
def switch(tmp_path_factory):
    """``switch(mode)``: what the connector does wrong from then on."""
    file = tmp_path_factory.mktemp("mutant") / "mode"
    os.environ[FILE] = str(file)
    yield file.write_text
    del os.environ[FILE]


@pytest.fixture(scope="module")
def engine(folder, place, asks, switch):
    switch("none")
    found = Engine(folder, place, module="tests.serving.vllm.mutants")
    yield found
    found.close()


@pytest.fixture(scope="module")
def crowd(asks, model):
    """Memories over one prefix of tokens, and the plain request of these very tokens."""
    chosen = [asks[name] for name in ALIKE]
    assert len({ask.ids for ask in chosen}) == 1
    plain = Ask("plain", chosen[0].ids, ())
    return [*chosen, plain], said_by_hf(model[0], plain)


def wrong_of(engine, crowd, expected, one_by_one):
    asked, plain = crowd
    found = engine.answers(asked, one_by_one=one_by_one)
    wanted = [plain if ask.memory is None else expected(ask.name) for ask in asked]
    pairs = zip(asked, wanted, found, strict=True)
    return [ask.name for ask, a, b in pairs if differences(a, b)]


@pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "one batch"])
def test_memories_over_the_same_tokens_do_not_meet(engine, switch, crowd, expected, one_by_one):
    switch("none")
    for _ in range(2):  # the second time, vLLM finds all of it in its prefix cache
        assert wrong_of(engine, crowd, expected, one_by_one) == []


def test_in_the_other_order_as_well(engine, switch, crowd, expected):
    switch("turned")  # nothing wrong, and salts of its own
    asked, plain = crowd
    assert wrong_of(engine, (asked[::-1], plain), expected, True) == []


def test_without_the_salt_they_meet(engine, switch, crowd, expected):
    switch("unsalted")
    assert len(wrong_of(engine, crowd, expected, one_by_one=True)) >= 3


def test_a_salt_of_the_client_stays(engine, asks, expected):
    ask = asks["a-whole"]
    prompt = {"prompt_token_ids": list(ask.ids), "cache_salt": "tenant"}
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=4, extra_args=ask.request.extra_args)
    for cached in (ask.request.slots, len(ask.ids) // 32 * 32):
        output = engine.llm.generate([prompt], sampling, use_tqdm=False)[0]
        assert tuple(output.outputs[0].token_ids) == expected("a-whole").tokens[:4]
        assert output.num_cached_tokens >= min(cached, ask.request.slots)


@pytest.mark.parametrize("mutant", MODES)
def test_every_mutant_is_found(engine, switch, asks, expected, mutant):
    switch(mutant)
    answers = engine.answers([dataclasses.replace(asks[name], request=None) for name in JUDGED])
    found = [
        name
        for name, answer in zip(JUDGED, answers, strict=True)
        if differences(expected(name), answer)
    ]
    assert found == list(JUDGED)


def test_what_the_mutants_were_judged_by_holds(engine, switch, asks, expected):
    switch("right")
    answers = engine.answers([asks[name] for name in JUDGED])
    wanted = [expected(name) for name in JUDGED]
    assert [differences(a, b) for a, b in zip(wanted, answers, strict=True)] == [[]] * len(JUDGED)
