"""What a harness asks, answered behind a memory: against the plain model over the whole text."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import kvedit as kv
from kvedit.errors import ContextTooLong, IncompatibleModel, InvalidArgument, MissingDependency
from kvedit.interop import Answers
from kvedit.interop.lm_eval import _grouped, _settings, evaluated, model_class
from kvedit.models.tiny import tiny_model
from tests.interop.steering_cases import hooked, random_delta

TEXT = "The thing in the box is the answer. The refund window is 60 days."
REQUESTS = [
    (" So you would", " wait for it"),
    (" So you would", " wait for it and say that it is so"),
    (" And", " 60"),
    (" It is the answer ", "that you wait for"),
]


@pytest.fixture(scope="module")
def case():
    model, tokenizer = tiny_model("llama")
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, memory=kv.capture(model, tokenizer, TEXT)
    )


def truth(model, context, continuation):
    """Log-probability and greediness by one plain pass over all ids."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(context) - 1 : -1].double()
    wanted = torch.tensor(continuation)
    logprob = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    return float(logprob), bool((logits.argmax(-1) == wanted).all())


def ids_of(tokenizer, *parts):
    """Ids of each part of a text that is cut as a whole; BOS first."""
    ends = [len(tokenizer("".join(parts[: n + 1])).input_ids) for n in range(len(parts))]
    whole, starts = tokenizer("".join(parts)).input_ids, [0, *ends]
    return [whole[a:b] for a, b in zip(starts, ends, strict=False)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("behind", [True, False])
def test_likelihoods(case, batch, behind):
    answers = Answers(case.model, case.tokenizer, case.memory if behind else None, batch=batch)
    found = answers.likelihoods(REQUESTS)
    for (context, continuation), (logprob, greedy) in zip(REQUESTS, found, strict=True):
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        front = TEXT if behind else ""
        before, told = ids_of(case.tokenizer, front + bare, continuation)
        wanted, likeliest = truth(case.model, before, told)
        assert logprob == pytest.approx(wanted, abs=1e-3)
        assert greedy == likeliest
    model_says = kv.generate(
        case.model, case.tokenizer, case.memory, " So you would", max_new_tokens=4
    )
    assert not behind or answers.likelihoods([(" So you would", model_says)])[0][1]


def test_an_edit_of_the_memory_shows(case):
    request = [(" So the refund window is", " 60 days")]
    edited = kv.editors.Suppress(span="60 days", strength=float("inf"))(case.memory)
    plain, without = (
        Answers(case.model, case.tokenizer, memory).likelihoods(request)[0][0]
        for memory in (case.memory, edited)
    )
    assert abs(plain - without) > 0.01
    again = kv.score(case.model, case.tokenizer, edited, *request[0][:1], [request[0][1]])
    assert without == pytest.approx(again[0].logprob, abs=1e-4)


def test_an_empty_context(case):
    line = case.tokenizer("\n", add_special_tokens=False).input_ids
    told = case.tokenizer("The box", add_special_tokens=False).input_ids
    front = case.memory.tokens.tolist()
    found = Answers(case.model, case.tokenizer, case.memory).likelihoods([("", "The box")])
    assert found[0][0] == pytest.approx(truth(case.model, [*front, *line], told)[0], abs=1e-3)
    bos = case.tokenizer.bos_token_id
    found = Answers(case.model, case.tokenizer).likelihoods([("", "The box")])
    assert found[0][0] == pytest.approx(truth(case.model, [bos], told)[0], abs=1e-3)
    colon = case.tokenizer(":", add_special_tokens=False).input_ids
    found = Answers(case.model, case.tokenizer, prefix=":").likelihoods([("", "The box")])
    assert found[0][0] == pytest.approx(truth(case.model, colon, told)[0], abs=1e-3)


def test_rolling(case):
    answers = Answers(case.model, case.tokenizer, case.memory, batch=3)
    texts = ["It is so.", "You would wait for it and say that it is so."]
    line = case.tokenizer("\n", add_special_tokens=False).input_ids
    front = [*case.memory.tokens.tolist(), *line]
    for text, found in zip(texts, answers.rolling(texts), strict=True):
        told = case.tokenizer(text, add_special_tokens=False).input_ids
        assert found == pytest.approx(truth(case.model, front, told)[0], abs=1e-3)


def test_rolling_in_windows(case):
    """Each token once; windows of 8 behind the memory anew, the last with as much as fits."""
    answers = Answers(case.model, case.tokenizer, case.memory, max_length=8)
    text = "You would wait for it and say that it is so."
    told = case.tokenizer(text, add_special_tokens=False).input_ids
    line = case.tokenizer("\n", add_special_tokens=False).input_ids
    front, total = case.memory.tokens.tolist(), 0.0
    assert len(told) % 8 and len(told) > 16
    for start in range(0, len(told), 8):
        end = min(start + 8, len(told))
        before = told[max(0, end - 9) : start] if start else line
        assert len(before) + end - start - 1 <= 8
        total += truth(case.model, [*front, *before], told[start:end])[0]
    assert answers.rolling([text])[0] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("behind", [True, False])
def test_replies(case, behind):
    memory = case.memory if behind else None
    answers = Answers(case.model, case.tokenizer, memory, batch=2)
    contexts = [" So", " Then you would", " And the answer is that"]
    found = answers.replies(contexts, max_new_tokens=6)
    for context, reply in zip(contexts, found, strict=True):
        ids = case.tokenizer((TEXT if behind else "") + context, return_tensors="pt").input_ids
        made = case.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert reply == case.tokenizer.decode(made, skip_special_tokens=True)
    stop = found[1][2:4]
    short = answers.replies(contexts[1:2], max_new_tokens=6, stop=[stop])
    assert short == [found[1].split(stop)[0]]


def test_chat_turns(case):
    chat = [{"role": "system", "content": "The refund window is 60 days."}]
    memory = kv.capture(case.model, case.tokenizer, chat)
    answers = Answers(case.model, case.tokenizer, memory, chat=True)
    score = kv.score(case.model, case.tokenizer, memory, "How long?", ["60 days"])[0]
    found = answers.likelihoods([("How long?", "60 days")])[0][0]
    assert found == pytest.approx(score.logprob, abs=1e-4)
    reply = kv.generate(case.model, case.tokenizer, memory, "How long?", max_new_tokens=4)
    assert answers.replies(["How long?"], max_new_tokens=4) == [reply]
    short = Answers(case.model, case.tokenizer, memory, chat=True, max_length=9)
    with pytest.raises(ContextTooLong, match="a turn"):
        short.likelihoods([("How long is it that you would wait for it?", " 60")])


def test_too_long_a_context_loses_its_beginning(case):
    short = Answers(case.model, case.tokenizer, case.memory, max_length=10)
    context, continuation = " and so you would wait for it and say", " that it is"
    before, told = ids_of(case.tokenizer, TEXT + context, continuation)
    front = case.memory.tokens.tolist()
    kept = before[len(front) :][-(10 - len(told) + 1) :]
    assert len(kept) < len(before) - len(front)
    wanted = truth(case.model, [*front, *kept], told)[0]
    assert short.likelihoods([(context, continuation)])[0][0] == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(ContextTooLong, match="continuation"):
        short.likelihoods([("", "x" * 60)])
    with pytest.raises(ContextTooLong, match="11 new tokens"):
        short.replies(["So"], max_new_tokens=11)
    ids = torch.tensor([[*front, *before[len(front) :][-5:]]])
    made = case.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    reply = short.replies([context], max_new_tokens=6)
    assert reply == [case.tokenizer.decode(made, skip_special_tokens=True)]


def test_every_pass_runs_within_the_context(case):
    block = case.model.model.layers[1]
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))

    @contextmanager
    def around():
        with hooked([(block, vector)]):
            yield

    answers = Answers(case.model, case.tokenizer, around=around)
    context, continuation = " So you would", " wait for it"
    before, told = ids_of(case.tokenizer, context, continuation)
    with around():
        wanted = truth(case.model, before, told)[0]
        ids = torch.tensor([before])
        made = case.model.generate(ids, max_new_tokens=5, do_sample=False)[0, len(before) :]
    assert answers.likelihoods([(context, continuation)])[0][0] == pytest.approx(wanted, abs=1e-3)
    assert answers.replies([context], max_new_tokens=5) == [case.tokenizer.decode(made)]
    assert wanted != pytest.approx(truth(case.model, before, told)[0], abs=0.1)


def test_refused(case):
    other, _ = tiny_model("llama", seed=1)
    with pytest.raises(IncompatibleModel):
        Answers(other, case.tokenizer, case.memory)
    for options in ({"batch": 0}, {"max_length": 1}):
        with pytest.raises(InvalidArgument):
            Answers(case.model, case.tokenizer, case.memory, **options)


def test_settings_of_the_harness():
    assert _settings({"until": ["\n", ""], "max_gen_toks": 7, "temperature": 0.0}) == {
        "max_new_tokens": 7,
        "stop": ["\n"],
    }
    assert _settings({"until": "x", "do_sample": False, "temperature": 1.0, "top_p": 0.9}) == {
        "max_new_tokens": 256,
        "stop": ["x"],
    }
    assert _settings({"temperature": 0.7, "max_tokens": 3, "top_k": 5}) == {
        "max_new_tokens": 3,
        "stop": [],
        "temperature": 0.7,
        "top_k": 5,
        "do_sample": True,
    }
    assert _settings({"do_sample": True})["do_sample"] is True
    asked = [SimpleNamespace(args=("", one)) for one in ({"a": 1}, {"a": 2}, {"a": 1})]
    assert _grouped(asked) == [[0, 2], [1]]


@pytest.fixture
def harness(monkeypatch):
    """As much of lm-eval as our class is made of, where the real one is not installed."""
    kept = []

    class LM:
        def __init__(self):
            add = lambda name, request, answer: kept.append((name, request, answer))  # noqa: E731
            self.cache_hook = SimpleNamespace(add_partial=add)

    model_class.cache_clear()
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(LM=LM))
    yield kept
    model_class.cache_clear()


def test_the_class_passes_requests_on(case, harness):
    """test_lm_eval.py has the real harness; this holds where it is missing."""
    lm = evaluated(case.model, case.tokenizer, case.memory, batch=2)
    answers = lm.answers

    def asked(*requests):
        return [SimpleNamespace(args=one) for one in requests]

    assert lm.loglikelihood(asked(*REQUESTS)) == answers.likelihoods(REQUESTS)
    assert lm.loglikelihood_rolling(asked(("It is so.",))) == answers.rolling(["It is so."])
    short, long = {"max_gen_toks": 2, "until": ["q"]}, {"max_gen_toks": 5}
    found = lm.generate_until(asked((" So", long), (" Then", short), (" And", long)))
    assert found == [
        *answers.replies([" So"], max_new_tokens=5),
        *answers.replies([" Then"], max_new_tokens=2, stop=["q"]),
        *answers.replies([" And"], max_new_tokens=5),
    ]
    assert [name for name, _, _ in harness].count("loglikelihood") == len(REQUESTS)
    assert harness[-1] == ("generate_until", (" And", long), found[-1])
    chat = [{"role": "user", "content": "How long?"}]
    assert lm.apply_chat_template(chat).startswith(lm.apply_chat_template(chat, False))
    assert lm.chat_template(True) == case.tokenizer.chat_template
    with pytest.raises(InvalidArgument, match="need a delta"):
        evaluated(case.model, case.tokenizer, strength=2.0)


def test_steering_reaches_every_pass(case, harness):
    delta = random_delta(case.model, case.tokenizer)
    vectors = delta.vectors["residual"].items()
    around = lambda: hooked([(case.model.model.layers[i], 0.7 * v) for i, v in vectors])  # noqa: E731
    wanted = Answers(case.model, case.tokenizer, case.memory, around=around)
    lm = evaluated(
        case.model, case.tokenizer, case.memory, delta=delta.operand(), strength=0.7
    ).answers
    found = lm.likelihoods(REQUESTS)
    for one, two in zip(found, wanted.likelihoods(REQUESTS), strict=True):
        assert one == (pytest.approx(two[0], abs=1e-3), two[1])
    contexts = [" So", " Then you would"]
    assert lm.replies(contexts, max_new_tokens=5) == wanted.replies(contexts, max_new_tokens=5)
    some = evaluated(
        case.model, case.tokenizer, case.memory, delta=delta, steering={"scope": "generation"}
    ).answers
    assert some.likelihoods(REQUESTS)[0][0] != pytest.approx(found[0][0], abs=1e-3)


def test_without_lm_eval(case, monkeypatch):
    model_class.cache_clear()
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"kvedit\[lm-eval\]"):
        evaluated(case.model, case.tokenizer, case.memory)
    model_class.cache_clear()
