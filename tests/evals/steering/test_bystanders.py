"""KL along the unedited model's own answers, against distributions taken by hand."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

import kvedit as kv
from kvedit.errors import InvalidArgument
from kvedit.evals.steering import Bystanders, with_instruction
from kvedit.steering import go_on, prompted, steered

from .conftest import PROMPTS


def test_nothing_moves_nothing(bystanders) -> None:
    for make in (lambda: None, lambda: lambda memory: memory, None):
        found = bystanders.moved(make)
        assert tuple(found) == bystanders.keys
        assert all(abs(moved.kl) < 1e-6 and moved.flipped == 0 for moved in found.values())
    assert {moved.kl for moved in found.values()} == {0.0}


def test_kl_is_that_of_distributions_taken_by_hand(tiny, delta, bystanders) -> None:
    model, tokenizer = tiny
    editor, operand = kv.editors.Steer(values=4.0, keys=1.0, layers=(1,)), delta.operand()
    found = bystanders.moved(lambda: lambda memory: editor(memory, operand), [2, 7])
    assert list(found) == [bystanders.keys[2], bystanders.keys[7]]
    for index in (2, 7):
        turn = [{"role": "user", "content": PROMPTS[index]}]
        memory = prompted(model, tokenizer, None, turn)
        answer = list(bystanders.answers[index])
        assert tokenizer.decode(answer) == go_on(model, tokenizer, memory, max_new_tokens=5)
        plain, loud = (
            kv.score(
                model, None, m, tokenizer("\n", add_special_tokens=False)["input_ids"], [answer]
            )[0]
            for m in (memory, editor(memory, operand))
        )
        p, q = (s.logits.double().log_softmax(-1) for s in (plain, loud))
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        moved = found[bystanders.keys[index]]
        assert moved.kl == pytest.approx(expected, rel=1e-3) and moved.kl > 0.01
        same = plain.logits.argmax(-1) == loud.logits.argmax(-1)
        assert moved.flipped == pytest.approx(1 - float(same.double().mean()))


def test_the_unedited_model_is_read_outside_of_steering(tiny, delta, always) -> None:
    model, _ = tiny
    residual = delta.only(sites="residual")

    def make():
        return steered(model, residual, 3.0)

    # What is kept, and what is read anew because nothing may be kept, in another order.
    kept, poor = Bystanders(always, PROMPTS), Bystanders(always, PROMPTS, keep_bytes=0)
    assert kept.answers and min(kept.entropy) > 0
    a, b = kept.moved(make), poor.moved(make)
    assert fmean(m.kl for m in a.values()) > 0.05
    for key in kept.keys:
        assert a[key].kl == pytest.approx(b[key].kl, abs=1e-5)
    assert poor.answers == kept.answers
    assert all(abs(m.kl) < 1e-6 for m in poor.moved(lambda: None).values())


def test_what_the_prompt_says_besides_counts_too(bystanders) -> None:
    found = bystanders.moved(None, [0, 1], with_instruction("Write backwards."))
    assert all(moved.kl > 1e-3 for moved in found.values())


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.7])
def test_parts_are_alike_in_entropy_and_do_not_overlap(bystanders, share) -> None:
    first, rest = bystanders.split(share, seed=1)
    assert sorted(first + rest) == list(range(10)) and len(first) == round(10 * share)
    assert bystanders.split(share, seed=1) == (first, rest)
    order = sorted(range(10), key=lambda i: bystanders.entropy[i])
    ranks = sorted(order.index(i) for i in first)
    # One of each run of neighbours.
    edges = [round(part * 10 / len(first)) for part in range(len(first) + 1)]
    for rank, low, high in zip(ranks, edges, edges[1:], strict=False):
        assert low <= rank < high


def test_entropy_is_that_of_the_answers_distributions(bystanders, once) -> None:
    places = once.places(PROMPTS[:1])
    (p,) = once.along(places, [bystanders.answers[0]], lambda memory: memory)
    expected = torch.distributions.Categorical(logits=p).entropy().mean()
    assert bystanders.entropy[0] == pytest.approx(float(expected), rel=1e-4)


def test_bystanders_are_checked(once) -> None:
    for wrong in ([], "one", ["a b", "a b"]):
        with pytest.raises(InvalidArgument):
            Bystanders(once, wrong)
    with pytest.raises(InvalidArgument, match="split"):
        Bystanders(once, ["a b"]).split(0.5)
