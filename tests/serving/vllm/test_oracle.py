"""vLLM says what HF says over the same memory: 24 greedy tokens, and the likeliest next ones."""

import pytest

from tests.serving.vllm.harness import Engine, differences, worst

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(folder, place, asks):
    found = Engine(folder, place)
    yield found
    found.close()


@pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "one batch"])
def test_every_memory_equals_hf(engine, asks, expected, one_by_one, record_property):
    assert len(asks) >= 30
    names = list(asks)
    answers = engine.answers([asks[name] for name in names], one_by_one=one_by_one)
    wrong = {
        name: found
        for name, answer in zip(names, answers, strict=True)
        if (found := differences(expected(name), answer))
    }
    assert not wrong
    off = max(worst(expected(n), a) for n, a in zip(names, answers, strict=True))
    record_property("worst", off)
    print(f"{len(names)} cases, largest difference of a log-probability {off:.2g}")


def test_edits_change_what_is_said(asks, expected):
    # Else the test above could pass with any memory.
    for text in ("a", "b", "c"):
        whole = expected(f"{text}-whole")
        for edit in ("no-values", "keys-moved", "values-moved"):
            assert differences(whole, expected(f"{text}-{edit}")), edit
