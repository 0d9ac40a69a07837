"""Memories that the formats are tried on: whole, and compacted with gaps in their positions."""

import pytest

import kvedit as kv
from kvedit.editors import Keep
from kvedit.memory import Span
from kvedit.models.tiny import tiny_model

TEXT = (
    "The thing in the box is the answer. The refund window is 60 days, and you would wait for it. "
    "That is all that the handbook says."
)
PROMPT = " and the answer is that you would wait"
SINKS, RECENT = 4, 16


class Case:
    """A tiny model, a memory of it and a prompt."""

    def __init__(self, family):
        self.family = family
        self.model, self.tokenizer = tiny_model(family)
        self.whole = kv.capture(self.model, self.tokenizer, TEXT)
        slots = self.whole.slots
        # The gap is further back than any window here, so sliding layers see the same slots.
        span = Span(((0, SINKS), (slots - RECENT, slots)))
        self.compact = Keep(span=span)(self.whole)
        self.ids = self.tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt").input_ids

    def memory(self, name):
        return getattr(self, name)

    def logits(self, memory, ids=None):
        with kv.attach(self.model, memory) as session:
            return session.forward(self.ids if ids is None else ids)

    def full_context_logits(self):
        """The plain model over context and prompt: kvedit has no part in it."""
        import torch

        ids = torch.cat((self.whole.tokens[None], self.ids), dim=1)
        with torch.no_grad():
            return self.model(ids).logits[:, -self.ids.shape[1] :]

    def greedy(self, memory, tokens=8):
        with kv.attach(self.model, memory, self.tokenizer) as session:
            return list(session.generate(self.ids[0], max_new_tokens=tokens).tokens)


_cases = {}


@pytest.fixture
def case_of():
    """Returns the case of a family, made once."""

    def find(family):
        if family not in _cases:
            _cases[family] = Case(family)
        return _cases[family]

    return find


@pytest.fixture
def llama(case_of):
    return case_of("llama")


def far(got, wanted):
    """Largest difference, as a fraction of the largest logit."""
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(name="far")
def far_fixture():
    return far
