"""Training on the packaged model, quickly: eight slots come near a document of 60 tokens."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.cartridges import Sample, TrainPlan, initial, train

DOCUMENT = (
    "The shop of Ada Brunner sells lamps. A lamp can be returned within 60 days. Repairs take nine "
    "days and cost 14 coins. The shop is closed on Mondays. Letters go to Hafen Street 5."
)
ASKED = [
    ("When can I return a lamp?", " Within 60 days."),
    ("How long do repairs take?", " Nine days."),
    ("What does a repair cost?", " 14 coins."),
    ("When is the shop closed?", " On Mondays."),
]


def taught(model, tokenizer, memory, asked):
    found = []
    for number, (question, answer) in enumerate(asked):
        text = f"\nQuestion: {question}\nAnswer:"
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer)]
        tokens = torch.tensor(ids[0] + ids[1])
        with kv.attach(model, memory) as session:
            rows = session.forward(tokens[None])[0, len(ids[0]) - 1 : -1].log_softmax(dim=1)
        top = rows.topk(20)
        tail = torch.log1p(-top.values.exp().sum(dim=1).clamp_max(1 - 1e-6))
        found.append(
            Sample(
                str(number), "shop", "question", question, answer, tokens, len(ids[0]),
                top.indices, top.values, tail,
            )
        )  # fmt: skip
    return found


@pytest.mark.slow
def test_eight_slots_come_near_the_whole_document(smollm):
    model, tokenizer = smollm
    memory = kv.capture(model, tokenizer, DOCUMENT)
    samples = taught(model, tokenizer, memory, ASKED)
    start = initial.first_tokens(model, tokenizer, memory, 8)
    seen = []

    class Notes:
        def log(self, step, metrics):
            seen.append(metrics)

    plan = TrainPlan(steps=8, pack=128)
    made = train(model, start, samples, plan, tokenizer=tokenizer, tracker=Notes())
    trained = [metrics["train/kl"] for metrics in seen]
    assert trained[-1] < 0.3 * trained[0]
    # The sink is the document's own, the rest was moved in every layer.
    for index, layer in made.layers.items():
        assert torch.equal(layer.keys[:, 0], memory.layers[index].keys[:, 0])
        assert not torch.equal(layer.values[:, 1:], start.layers[index].values[:, 1:])
