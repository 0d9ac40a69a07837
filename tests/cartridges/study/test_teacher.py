"""Teacher's columns and turns, against full forward passes of the plain model."""

import pytest
import torch

import kvedit as kv
from kvedit.cartridges.study import (
    INTRO,
    Corpus,
    Decoding,
    Document,
    Turns,
    context_of,
    corpus_context,
    question_turn,
    samples_from,
    teacher_columns,
)
from kvedit.cartridges.study.decoding import _choose
from kvedit.errors import InvalidArgument, TemplateNotCuttable
from kvedit.models.tiny_tokenizer import tiny_tokenizer
from kvedit.runtime.text import encode
from kvedit.testing.tolerances import FP32_LOGITS

from .conftest import LAMPS, tiny

PAIRS = [
    ("What does the red lamp cost?", "Three euros."),
    ("In which room does the oak lamp stand, and since when?", None),
    ("And brass?", "It is in room 8, and from 1908."),
]
FAMILIES = ["llama", "qwen3", "gemma3"]


def without_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def full_pass(model, context, sample):
    """Log-probabilities at the answer's tokens by one plain pass over the whole prompt."""
    ids = torch.cat((context, sample.tokens))[None]
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    first = len(context) + sample.start
    return logits[first - 1 : first + len(sample) - sample.start - 1].log_softmax(dim=-1)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_columns_equal_a_full_pass_of_the_plain_model(family, chat, batch_size):
    model, tokenizer = tiny(family)
    context = context_of(tokenizer, "lamps", LAMPS, chat=chat)
    memory = kv.capture(model, tokenizer, context)
    samples = samples_from(
        model, tokenizer, PAIRS, memory, top_k=7, answer=Decoding(9), batch_size=batch_size
    )
    for sample, (question, answer) in zip(samples, PAIRS, strict=True):
        exact = full_pass(model, memory.tokens, sample)
        top = exact.topk(7)
        assert torch.equal(sample.top_ids, top.indices)
        assert (sample.top_logprobs - top.values).abs().max() <= FP32_LOGITS
        tail = torch.log1p(-top.values.exp().sum(dim=-1))
        assert (sample.tail - tail).abs().max() <= 10 * FP32_LOGITS  # 1 - sum loses a digit
        turn = question_turn(tokenizer, memory.source, question)
        assert torch.equal(sample.tokens[: sample.start], turn)
        if answer is not None:
            assert sample.answer == answer
            said = tokenizer.decode(sample.tokens[sample.start :])
            assert said == (f"{answer}<|im_end|>" if chat else f" {answer}\n\n")
        else:  # greedy: every token is the likeliest
            assert torch.equal(sample.tokens[sample.start :], exact.argmax(dim=-1))


def test_the_turn_is_what_a_session_is_fed():
    model, tokenizer = tiny()
    memory = kv.capture(model, tokenizer, [{"role": "system", "content": LAMPS}])
    with kv.attach(model, memory, tokenizer) as session:
        session.feed("Which one?")
        fed = session.source().tokens[len(memory.tokens) :]
    assert torch.equal(fed, question_turn(tokenizer, memory.source, "Which one?"))
    text = "<|im_start|>user\nWhich one?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(fed) == text


def test_plain_turns_need_no_template():
    tokenizer = without_template()
    context = context_of(tokenizer, "lamps", "They cost {text} {title}.")
    assert context == INTRO.split("{text}")[0].replace("{title}", "lamps") + (
        "They cost {text} {title}."
    )
    turn = question_turn(tokenizer, encode(tokenizer, context), "Which?")
    assert tokenizer.decode(turn) == "\n\nQuestion: Which?\nAnswer:"
    with pytest.raises(InvalidArgument, match="no chat template"):
        context_of(tokenizer, "lamps", "text", chat=True)
    with pytest.raises(InvalidArgument, match="question is empty"):
        question_turn(tokenizer, None, " ")


# Templates as there are: one drops system messages, one refuses them, one puts them into the
# user's turn; none of them can be cut behind a system message.
BODY = (
    "{% for m in rest %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = [
    "{% set rest = messages | rejectattr('role', 'equalto', 'system') | list %}" + BODY,
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% set rest = messages %}" + BODY,
]


@pytest.mark.parametrize("template", NO_SYSTEM)
def test_a_template_without_system_messages_reads_the_text_as_a_user_s(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    context = context_of(tokenizer, "lamps", LAMPS)
    assert [message["role"] for message in context] == ["user", "assistant"]
    source = encode(tokenizer, context)
    assert LAMPS in source.text
    turn = tokenizer.decode(question_turn(tokenizer, source, "Which?"))
    assert turn == "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_can_t_be_cut_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + NO_SYSTEM[0]
    with pytest.raises(TemplateNotCuttable, match="pass chat=False"):
        context_of(tokenizer, "lamps", LAMPS)


@pytest.mark.parametrize("chat", [True, False])
def test_turns_behind_a_long_context_are_rendered_on_a_short_one(chat):
    tokenizer = tiny_tokenizer()
    corpus = Corpus.of(Document("a", LAMPS * 12), Document("b", "Äöü 明治 “x”. " * 40))
    source = encode(tokenizer, corpus_context(tokenizer, corpus, chat=chat))
    assert len(source) > 3000
    turns = Turns(tokenizer, source)
    assert len(turns.source) < 600
    for question in ("Which?", " two\n\nlines {question} ", "明治?"):
        assert torch.equal(turns.tokens(question), question_turn(tokenizer, source, question))


def test_columns_of_known_logits():
    logits = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0)) * 3
    exact = logits.double().log_softmax(dim=-1)
    found = teacher_columns(logits, 8)
    top = exact.topk(8)
    assert torch.equal(found.top_ids, top.indices)
    torch.testing.assert_close(found.top_logprobs.double(), top.values, atol=1e-5, rtol=0)
    rest = torch.log1p(-top.values.exp().sum(dim=-1))
    torch.testing.assert_close(found.tail.double(), rest, atol=1e-4, rtol=0)


def test_a_tail_far_below_rounding_is_exact():
    logits = torch.tensor([[60.0, 0.0, 0.0, 0.0]])
    found = teacher_columns(logits, 1)
    assert float(found.tail) == pytest.approx(torch.tensor(3.0).log().item() - 60, abs=1e-4)


def test_all_of_the_vocabulary_leaves_no_tail():
    found = teacher_columns(torch.tensor([[2.0, 1.0, 0.0]]), 20)
    assert found.top_ids.tolist() == [[0, 1, 2]]
    assert found.tail.tolist() == [-torch.inf]


def test_an_uncertain_teacher_keeps_all_its_tokens_and_a_sure_one_few():
    sure, unsure = torch.zeros(100), torch.zeros(100)
    sure[7], sure[9] = 20.0, 10.0
    pair = torch.tensor([0.6, 0.395] + [0.005 / 98] * 98).log()
    found = teacher_columns(torch.stack((sure, unsure, pair)), 20, min_mass=0.99)
    counts = found.top_logprobs.isfinite().sum(dim=-1).tolist()
    assert counts == [1, 20, 2]
    kept = found.top_logprobs.double().exp().sum(dim=-1) + found.tail.double().exp()
    torch.testing.assert_close(kept, torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)
    assert float(found.tail[1].exp()) == pytest.approx(0.8, abs=1e-5)


@pytest.mark.parametrize(("k", "mass"), [(0, None), (5, 0.0), (5, 1.5)])
def test_bad_cuts_are_refused(k, mass):
    with pytest.raises(InvalidArgument, match="k >= 1"):
        teacher_columns(torch.zeros(3, 9), k, mass)


@pytest.mark.parametrize("top_p", [None, 0.8])
def test_draws_follow_the_distribution(top_p):
    probabilities = torch.tensor([0.45, 0.3, 0.15, 0.1])
    logits = (probabilities.log() * 0.7)[None].repeat(4000, 1)
    drawers = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    drawn = torch.tensor(_choose(logits, Decoding(1, 0.7, top_p), drawers))
    found = drawn.bincount(minlength=4) / 4000
    expected = probabilities.clone()
    if top_p is not None:
        expected[3] = 0  # the first three already have the mass
        expected /= expected.sum()
    # Four standard deviations of a share near one half.
    assert (found - expected).abs().max() < 4 * 0.5 / 4000**0.5


def test_given_pairs_follow_another_source_where_the_cartridge_has_one():
    model, tokenizer = tiny()
    memory = kv.capture(model, tokenizer, [{"role": "system", "content": LAMPS}])
    plain = encode(tokenizer, "A plain text.")
    chat, text = (
        samples_from(model, tokenizer, PAIRS[:1], memory, source=source)[0]
        for source in (None, plain)
    )
    assert tokenizer.decode(text.tokens[: text.start]).startswith("\n\nQuestion: ")
    assert torch.equal(chat.tokens[chat.start :], text.tokens[text.start :])
    assert torch.equal(chat.top_logprobs, text.top_logprobs)
    assert chat.key != text.key and chat.document == memory.digest


@pytest.mark.parametrize("pairs", [[], [("", "x")], [("Which?", " ")]])
def test_empty_pairs_are_refused(pairs):
    model, tokenizer = tiny()
    memory = kv.capture(model, tokenizer, LAMPS)
    with pytest.raises(InvalidArgument, match=r"empty|expected pairs"):
        samples_from(model, tokenizer, pairs, memory)


def test_sampled_answers_depend_on_their_number_not_on_the_batch():
    model, tokenizer = tiny()
    memory = kv.capture(model, tokenizer, LAMPS)
    pairs = [("Which lamp?", None)] * 4
    made = [
        samples_from(model, tokenizer, pairs, memory, answer=Decoding(8, 1.0), batch_size=size)
        for size in (4, 3, 1)
    ]
    tokens = [[sample.tokens.tolist() for sample in samples] for samples in made]
    assert tokens[0] == tokens[1] == tokens[2]
    assert len({tuple(ids) for ids in tokens[0]}) == 4
