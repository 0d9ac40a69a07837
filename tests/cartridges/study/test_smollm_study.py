"""Self-study by a real model: samples are about the text, and the teacher is the model."""

import pytest
import torch

import kvedit as kv
from kvedit.cartridges.study import (
    OPENINGS,
    Chunking,
    Corpus,
    Decoding,
    Document,
    Filters,
    StudySettings,
    context_of,
    corpus_context,
    samples_from,
    synthesize,
)
from kvedit.runtime.text import encode
from kvedit.testing.tolerances import FP32_LOGITS

TEXT = (
    "Harbour Museum of Vellin. The museum opened in 1962 in the old customs house. Its founder, "
    "Ottilie Brandt, had been a captain for thirty years. The largest exhibit is the Morning "
    "Heron, a fishing boat of 1887 that was raised from the bay in 1974. Tickets cost 9 euros, and "
    "children under twelve pay nothing. The museum is closed on Mondays. The cafe on the roof "
    "sells a fish soup that was the captain's own recipe. In winter the boat hall is heated to "
    "twelve degrees, because the hull must stay dry."
)


def answer_logprobs(model, sample):
    """Log-probabilities of an answer's tokens behind its question alone."""
    with torch.no_grad():
        logprobs = model(sample.tokens[None]).logits[0].log_softmax(dim=-1)
    chosen = sample.tokens[sample.start :, None]
    return logprobs[sample.start - 1 : -1].gather(1, chosen).squeeze(1)


@pytest.mark.slow
def test_smollm_studies_a_page(smollm, tmp_path):
    model, tokenizer = smollm
    corpus = Corpus.of(Document("the museum's leaflet", TEXT))
    settings = StudySettings(
        chunking=Chunking(min_tokens=60, max_tokens=200),
        kinds=(),
        prompts=OPENINGS,
        question=Decoding(32, 0.4, 0.9),
        answer=Decoding(48),
        filters=Filters(cut_answers=False),
    )
    made = synthesize(model, tokenizer, corpus, tmp_path / "set", settings, 6, 0, batch_size=8)
    assert len(made) == 6
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for sample in made:
        assert int(sample.tokens[-1]) == end or len(sample) - sample.start == 48
        mass = sample.top_logprobs.double().exp().sum(dim=-1) + sample.tail.double().exp()
        assert (mass - 1).abs().max() < 1e-4

    # The columns of one, by a plain pass over its chunk, its turn and its answer.
    sample, (start, stop) = made[0], map(int, made.row(0).chunk.split(":"))
    context = encode(tokenizer, context_of(tokenizer, sample.document, TEXT[start:stop]))
    ids = torch.cat((context.tokens, sample.tokens))[None]
    count = len(sample) - sample.start
    with torch.no_grad():
        exact = model(ids).logits[0, -count - 1 : -1].double().log_softmax(dim=-1)
    found = exact.gather(1, sample.top_ids)
    # Logits reach 20 here, and sums run over 30 layers in another order.
    assert (found - sample.top_logprobs).abs().max() <= 3 * FP32_LOGITS
    # Without the chunk it would say something else, so the comparison compared something.
    alone = answer_logprobs(model, sample)
    assert (alone - sample.top_logprobs[:, 0]).abs().max() > 0.5


@pytest.mark.slow
def test_smollm_teaches_given_answers(smollm):
    model, tokenizer = smollm
    corpus = Corpus.of(Document("the museum's leaflet", TEXT))
    memory = kv.capture(model, tokenizer, corpus_context(tokenizer, corpus))
    pairs = [("When is the museum closed?", f"On {day}s.") for day in ("Monday", "Friday")]
    right, wrong = samples_from(model, tokenizer, pairs, memory)

    def logprob(sample):
        chosen = sample.tokens[sample.start :, None] == sample.top_ids
        return sample.top_logprobs.masked_fill(~chosen, -torch.inf).amax(dim=1)[1]

    assert float(logprob(right)) > float(logprob(wrong)) + 1
