"""The same answers when vLLM schedules otherwise: chunks, preemption, further turns, compiled."""

import pytest

from tests.serving.vllm.harness import Ask, Engine, differences, said_by_hf

pytestmark = pytest.mark.vllm

SOME = ("a-whole", "b-aligned", "c-unaligned", "b-snap", "a-steered", "cartridge-257", "one-slot")


def wrong(engine, asks, expected, names=SOME):
    answers = engine.answers([asks[name] for name in names])
    return {n: d for n, a in zip(names, answers, strict=True) if (d := differences(expected(n), a))}


@pytest.fixture
def start(folder, place, asks):
    """``start(**options)``: an engine that ends with the test."""
    running = []

    def started(**options):
        running.append(Engine(folder, place, **options))
        return running[-1]

    yield started
    for engine in running:
        engine.close()


def test_chunked_prefill(start, asks, expected):
    engine = start(max_num_batched_tokens=24, max_num_seqs=16, enable_chunked_prefill=True)
    names = [*SOME, "a-plain", "b-plain"]
    assert wrong(engine, asks, expected, names) == {}


def test_preemption(start, asks, expected):
    # Two prompts of 7 pages fit into 15, and not the eighth page that both come to need.
    engine = start(num_gpu_blocks_override=16, max_model_len=448, disable_log_stats=False)
    names = [name for name in asks if name.startswith(("a-", "b-"))][:10]
    assert wrong(engine, asks, expected, names) == {}
    counters = {m.name: m.value for m in engine.llm.get_metrics() if hasattr(m, "value")}
    assert counters["vllm:num_preemptions"] > 0


def test_two_more_turns(start, asks, expected, model):
    engine = start()
    for name in ("a-whole", "b-knorm", "cartridge-96"):
        ask = asks[name]
        ids, behind = ask.ids, ask.behind
        for turn in (" And then", "\nBut why?"):
            said = engine.answers([Ask(name, ids, behind, params=ask.params)])[0].tokens
            more = (*said, *model[1](turn).input_ids)
            ids, behind = (*ids, *more), (*behind, *more)
            wanted = said_by_hf(model[0], Ask(name, ids, behind, ask.memory))
            again = Ask(name, ids, behind, params=ask.params, request=ask.request)
            assert not differences(wanted, engine.answers([again])[0])


def test_larger_pages_and_no_prefix_cache(start, asks, expected):
    engine = start(block_size=128, enable_prefix_caching=False)
    for _ in range(2):
        assert wrong(engine, asks, expected) == {}


def test_compiled(start, asks, expected):
    assert wrong(start(enforce_eager=False), asks, expected) == {}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"transfer": {"kv_load_failure_policy": "recompute"}}, "recomputed are placeholders"),
        ({"extra": {"stores": "misspelt"}}, "kv_connector_extra_config: expected store"),
    ],
)
def test_engines_that_cannot_serve_do_not_start(start, capfd, options, says):
    with pytest.raises(Exception, match=r"Engine core initialization failed|kvedit"):
        start(**options)
    assert says in "".join(capfd.readouterr())
