"""steered: against hooks by hand on one unpadded, uncached row, however the tokens come."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Emphasize
from kvedit.errors import IncompatibleModel, InvalidArgument, UnknownName
from kvedit.models.tiny import tiny_model
from kvedit.runtime.saying import saying
from kvedit.steering import steered
from kvedit.steering.scopes import Generation, Last, Positions, Prompt, as_scope
from kvedit.testing.steering import random_delta

STEPS, TOL = 5, 1e-6
STREAM = ("residual", "attention")
CONTEXT, PROMPT = "The thing in the box is", " the answer, and you would"

# Scope, and the same as columns of a row: (length so far, tokens given at last, memory's tokens).
SCOPES: dict[str, tuple[Any, Any]] = {
    "all": ("all", lambda n, given, held: range(held, n)),
    "prompt": ("prompt", lambda n, given, held: range(held, given)),
    "generation": ("generation", lambda n, given, held: range(given, n)),
    "last": (Last(2), lambda n, given, held: range(given - 2, given)),
    "positions": (
        Positions(8, 11),
        lambda n, given, held: [c for c in range(8, 11) if held <= c < n],
    ),
    "either": (Last(1) | "generation", lambda n, given, held: range(given - 1, n)),
    "without": (Prompt() - Last(3), lambda n, given, held: range(held, given - 3)),
}


def blocks(model: Any) -> Any:
    """The list of layers, and each one's attention."""
    body = next(child for name, child in model.named_children() if name != "lm_head")
    found = body.h if hasattr(body, "h") else body.layers
    name = next(n for n in ("self_attn", "attention", "attn") if hasattr(found[0], n))
    return found, [getattr(block, name) for block in found]


def steer_rows(states: Any, vector: Any, operator: str, strength: float, norm: bool) -> Any:
    """One steered state after the other, [n, hidden]."""
    made = []
    unit = vector / vector.norm()
    for state in states:
        new = state
        if operator != "add":
            new = new - (1.0 if operator == "ablate_add" else strength) * (new @ unit) * unit
        if operator != "ablate":
            new = new + strength * vector
        made.append(new * state.norm() / new.norm() if norm else new)
    return torch.stack(made)


def run(
    model: Any, ids: Sequence[int], columns: Sequence[int], delta: Any, strength: float,
    operator: str = "add", norm: bool = False, cache: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Logits [n, vocabulary] of ids, with the tokens at ``columns`` steered."""
    layers, attentions = blocks(model)
    chosen = list(columns)

    def hook(vector: torch.Tensor) -> Any:
        def change(module: Any, args: Any, output: Any) -> Any:
            states = (output[0] if isinstance(output, tuple) else output).clone()
            if chosen:
                part = states[0, chosen]
                states[0, chosen] = steer_rows(part, vector.to(states), operator, strength, norm)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return change

    handles = []
    for site, modules in (("residual", layers), ("attention", attentions)):
        for index, vector in delta.vectors.get(site, {}).items():
            handles.append(modules[index].register_forward_hook(hook(vector)))
    try:
        with torch.no_grad():
            options = {"use_cache": False} if cache is None else {"cache": cache}
            return model(torch.tensor([list(ids)]), **options).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def greedy(
    model: Any, ids: Sequence[int], steps: int, columns: Any, *args: Any, **kwargs: Any
) -> Any:
    """Ids and logits [step, vocabulary] of a greedy reply; columns(length, given) are steered."""
    grown, logits, given = list(ids), [], len(ids)
    for _ in range(steps):
        logits.append(run(model, grown, columns(len(grown), given), *args, **kwargs)[-1])
        grown.append(int(logits[-1].argmax()))
    return grown[given:], torch.stack(logits)


@lru_cache
def model_of(family: str) -> Any:
    return tiny_model(family, dtype=torch.float64)


@lru_cache
def delta_of(model: Any, **options: Any) -> Any:
    options = {"sites": STREAM, "scale": 0.2, **options}
    return random_delta(model, None, **options)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


# A scope picks tokens in the same way in every family: all with one, some with each of the others.
BEHIND = [
    *(("llama", scope) for scope in SCOPES),
    *(("gemma3", scope) for scope in ("all", "last", "generation")),
    *(("gpt_neox", scope) for scope in ("positions", "without")),
    *(("gpt2", scope) for scope in ("positions", "prompt")),
    ("qwen3", "either"),
]


@pytest.mark.parametrize(("family", "scope"), BEHIND)
def test_behind_a_memory(family: str, scope: str) -> None:
    """kv.generate, and session calls, with the cache on; the memory itself was read unsteered."""
    model, tokenizer = model_of(family)
    delta = delta_of(model)
    memory = kv.capture(model, tokenizer, CONTEXT)
    held, new = memory.tokens_count, ids_of(tokenizer, PROMPT)
    chosen, columns = SCOPES[scope]
    every = [*memory.tokens.tolist(), *new]
    said, expected = greedy(model, every, STEPS, lambda n, g: columns(n, g, held), delta, 3.0)
    with steered(model, delta, 3.0, scope=chosen):
        made = kv.generate(model, None, memory, new, max_new_tokens=STEPS)
        with kv.attach(model, memory) as session:
            logits = [session.feed(new)]
            with saying():
                logits += [session.forward(torch.tensor([[t]]))[:, -1] for t in said[:-1]]
    assert (torch.cat(logits) - expected).abs().max() <= TOL
    assert made == said[: len(made)]
    plain, other = greedy(model, every, STEPS, lambda n, g: (), delta, 3.0)
    assert scope == "positions" or (other - expected).abs().max() > 1e-3
    assert kv.generate(model, None, memory, new, max_new_tokens=STEPS) == plain[: len(plain)]


HOW = {
    "cached": (("llama", "gemma3"), {}),
    "uncached": (("qwen3",), {"use_cache": False}),
    "pieces": (("gpt_neox",), {"prefill_chunk_size": 3}),
}


@lru_cache
def alone(family: str, text: str, scope: str) -> Any:
    """The reply to a text that is steered at a scope by hand: ids, logits [step, vocabulary]."""
    model, tokenizer = model_of(family)
    columns = SCOPES[scope][1]
    ids = ids_of(tokenizer, text)
    return greedy(model, ids, STEPS, lambda n, g: columns(n, g, 0), delta_of(model), 3.0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("scope", ["all", "prompt", "generation", "last", "positions"])
def test_padded_batches_of_plain_generate(scope: str, how: str) -> None:
    families, options = HOW[how]
    for family in families:
        model, tokenizer = model_of(family)
        delta, texts = delta_of(model), (CONTEXT + PROMPT, PROMPT, "In the box we are")
        rows = [ids_of(tokenizer, text) for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with steered(model, delta, 3.0, scope=SCOPES[scope][0]):
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, eos_token_id=-1,
                output_logits=True, return_dict_in_generate=True, **options,
            )  # fmt: skip
        for row, text in enumerate(texts):
            said, expected = alone(family, text, scope)
            logits = torch.stack([step[row] for step in out.logits])
            assert (logits - expected).abs().max() <= TOL
            assert out.sequences[row, width:].tolist() == said


@pytest.mark.parametrize(
    ("scope", "family"),
    [("prompt", "llama"), ("generation", "gemma3"), ("last", "gpt_neox"), ("generation", "qwen3")],
)
def test_turns_of_a_batch(scope: str, family: str) -> None:
    """What was said last is read in front of the next turn, and is no prompt."""
    model, tokenizer = model_of(family)
    delta = delta_of(model)
    texts = (CONTEXT, "We are")
    memories = [kv.capture(model, tokenizer, text) for text in texts]
    turns = [[ids_of(tokenizer, t) for t in pair] for pair in
             ((PROMPT, " Why?"), (" And so it is that we would", " for the refund"))]  # fmt: skip
    with steered(model, delta, 3.0, scope=SCOPES[scope][0]), kv.attach(model, memories) as session:
        replies = [session.generate(prompts, max_new_tokens=STEPS) for prompts in turns]
        grown = [session.memory(row) for row in range(2)]
    for row, memory in enumerate(memories):
        ids, columns = memory.tokens.tolist(), []
        for prompts, reply in zip(turns, replies, strict=True):
            first = len(ids)
            ids += prompts[row]
            given = {"prompt": range(first, len(ids)), "last": range(len(ids) - 2, len(ids))}
            columns += given.get(scope, ())
            said = list(reply[row].tokens)
            scoped = scope == "generation"

            def now(n: int, g: int, kept: Any = tuple(columns), scoped: bool = scoped) -> Any:
                return [*kept, *(range(g, n) if scoped else ())]

            expected, _ = greedy(model, ids, len(said), now, delta, 3.0)
            assert said == expected
            columns += range(len(ids), len(ids) + len(said)) if scoped else ()
            ids += said
        assert grown[row].tokens.tolist() == ids
        from transformers import DynamicCache

        cache = DynamicCache()
        run(model, ids, columns, delta, 3.0, cache=cache)
        for index, layer in grown[row].layers.items():
            assert (layer.values - cache.layers[index].values[0]).abs().max() <= TOL


def test_turns_of_plain_generate() -> None:
    from transformers import DynamicCache

    model, tokenizer = model_of("llama")
    delta, cache = delta_of(model), DynamicCache()
    first, second = ids_of(tokenizer, CONTEXT), ids_of(tokenizer, PROMPT)
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": -1, "cache": cache}
    with steered(model, delta, 3.0, scope="generation"):
        one = model.generate(torch.tensor([first]), **options)[0].tolist()
        two = model.generate(torch.tensor([one + second]), **options)[0].tolist()
    between, end = len(first), len(one) + len(second)
    said, _ = greedy(model, first, STEPS, lambda n, g: range(g, n), delta, 3.0)
    assert one == first + said
    again, _ = greedy(
        model,
        one + second,
        STEPS,
        lambda n, g: [*range(between, len(one)), *range(end, n)],
        delta,
        3.0,
    )
    assert two[end:] == again


@pytest.mark.parametrize("scope", ["all", "positions"])
def test_pieces_fed_by_hand(scope: str) -> None:
    model, tokenizer = model_of("gemma3")
    delta = delta_of(model)
    memory = kv.capture(model, tokenizer, CONTEXT)
    new = ids_of(tokenizer, PROMPT)
    chosen, columns = SCOPES[scope]
    every = [*memory.tokens.tolist(), *new]
    held = memory.tokens_count
    expected = run(model, every, columns(len(every), len(every), held), delta, 3.0)[held:]
    with steered(model, delta, 3.0, scope=chosen), kv.attach(model, memory) as session:
        pieces = [session.forward(torch.tensor([new[i : i + 3]]))[0] for i in range(0, len(new), 3)]
    assert (torch.cat(pieces) - expected).abs().max() <= TOL
    with (
        pytest.raises(InvalidArgument, match="its end was not known in the first"),
        steered(model, delta, 3.0, scope=Last(1)),
        kv.attach(model, memory) as session,
    ):
        session.forward(torch.tensor([new[:3]]))
        session.forward(torch.tensor([new[3:]]))


def test_right_padding_and_uncached_rows() -> None:
    model, tokenizer = model_of("llama")
    delta = delta_of(model)
    rows = [ids_of(tokenizer, CONTEXT), ids_of(tokenizer, "We are")]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with steered(model, delta, 3.0, scope=Last(2)), torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    for row, given in enumerate(rows):
        expected = run(model, given, range(len(given) - 2, len(given)), delta, 3.0)
        assert (logits[row, : len(given)] - expected).abs().max() <= TOL


def test_left_padding_without_positions() -> None:
    """Positions are a token's own, though transformers counts padding unless it is told."""
    model, tokenizer = model_of("llama")
    delta, given = delta_of(model), ids_of(tokenizer, CONTEXT)
    ids, mask = torch.tensor([[0, 0, 0, *given]]), torch.tensor([[0] * 3 + [1] * len(given)])
    with steered(model, delta, 3.0, scope=Positions(1, 4)), torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[0, 3:]
    assert (logits - run(model, given, range(1, 4), delta, 3.0)).abs().max() <= 1e-4


def test_a_span_of_the_prompt() -> None:
    model, tokenizer = model_of("qwen3")
    delta = delta_of(model)
    chat = [{"role": "user", "content": "The refund window is 60 days. Is it?"}]
    read = kv.steering.prompted(model, tokenizer, None, chat)
    span = read.find("60 days")
    with steered(model, delta, 3.0, scope=span):
        one = kv.steering.prompted(model, tokenizer, None, chat)
    with steered(model, delta, 3.0, scope=Positions.of(read, {"text": "60 days"})):
        two = kv.steering.prompted(model, tokenizer, None, chat)
    from transformers import DynamicCache

    cache = DynamicCache()
    columns = [c for a, b in span.ranges for c in range(a, b)]
    assert 1 < len(columns) < read.tokens_count
    run(model, read.tokens.tolist(), columns, delta, 3.0, cache=cache)
    for index, layer in one.layers.items():
        assert (layer.values - cache.layers[index].values[0]).abs().max() <= TOL
        assert torch.equal(layer.values, two.layers[index].values)
    assert as_scope(span) == Positions.of(read, span)


def test_scores_are_of_what_would_be_said() -> None:
    model, tokenizer = model_of("llama")
    delta = delta_of(model)
    memory = kv.capture(model, tokenizer, CONTEXT)
    new, held = ids_of(tokenizer, PROMPT), memory.tokens_count
    answers = [ids_of(tokenizer, " wait for the refund"), ids_of(tokenizer, " box")]
    for scope in ("generation", "last"):
        chosen, columns = SCOPES[scope]
        with steered(model, delta, 3.0, scope=chosen):
            scores = kv.score(model, None, memory, new, answers)
        for answer, score in zip(answers, scores, strict=True):
            every = [*memory.tokens.tolist(), *new, *answer]
            given = held + len(new)
            logits = run(model, every, columns(len(every), given, held), delta, 3.0)[given - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert (score.logprobs - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("operator", ["add", "ablate", "ablate_add"])
def test_operators(operator: str, norm: bool) -> None:
    model, tokenizer = model_of("llama")
    for sites in (("residual",), ("attention",)):
        delta = delta_of(model, sites=sites, layers=(0, 2))
        ids = ids_of(tokenizer, CONTEXT)
        for strength in (1.0, -0.7):
            with steered(model, delta, strength, operator=operator, preserve_norm=norm):
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0]
            expected = run(model, ids, range(len(ids)), delta, strength, operator, norm)
            assert (logits - expected).abs().max() <= TOL
    layer, delta = blocks(model)[0][2], delta_of(model, sites=("residual",), layers=(2,))
    vector, seen = delta.vectors["residual"][2].double(), []
    with steered(model, delta, operator="ablate"):
        handle = layer.register_forward_hook(
            lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
        )
        with torch.no_grad():
            model(torch.tensor([ids]))
        handle.remove()
    assert (seen[-1] @ (vector / vector.norm())).abs().max() <= TOL


def test_half_precision_keeps_its_dtype() -> None:
    model, tokenizer = tiny_model("llama", dtype=torch.bfloat16)
    delta = delta_of(model)
    ids = torch.tensor([ids_of(tokenizer, CONTEXT)])
    with steered(model, delta, 2.0, preserve_norm=True), torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    with torch.no_grad():
        assert (model(ids).logits - logits).abs().max() > 0.1


def test_blocks_nest_and_add_up() -> None:
    model, tokenizer = model_of("llama")
    one, two = delta_of(model, seed=1), delta_of(model, seed=2, sites=("residual",))
    memory = kv.capture(model, tokenizer, CONTEXT)
    new = ids_of(tokenizer, PROMPT)

    def logits() -> torch.Tensor:
        with kv.attach(model, memory) as session:
            return session.feed(new)

    plain = logits()
    with steered(model, 2.0 * one + -3.0 * two):
        expected = logits()
    with steered(model, one, 2.0), steered(model, two, -3.0):
        assert (logits() - expected).abs().max() <= TOL
    outer, inner = steered(model, one, 2.0), steered(model, two, -3.0)
    outer.__enter__()
    with inner:
        assert (logits() - expected).abs().max() <= TOL
    alone = logits()
    outer.__exit__(None, None, None)
    with steered(model, one, 2.0):
        assert torch.equal(logits(), alone)
    assert torch.equal(logits(), plain)


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_left_after_an_exception() -> None:
    model, tokenizer = model_of("llama")
    delta = delta_of(model)
    memory = kv.capture(model, tokenizer, CONTEXT)
    new = ids_of(tokenizer, PROMPT)
    before, plain = hooks(model), kv.generate(model, None, memory, new, max_new_tokens=3)
    with pytest.raises(RuntimeError, match="stop here"), steered(model, delta, 3.0):
        assert hooks(model) > before
        assert "generate" in vars(model)
        raise RuntimeError("stop here")
    with pytest.raises(InvalidArgument), steered(model, delta, scope=Last(0)):
        raise AssertionError
    assert hooks(model) == before
    assert "generate" not in vars(model)

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("halfway")

    with steered(model, delta, 3.0, scope="generation"), kv.attach(model, memory) as session:
        handle = blocks(model)[0][1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="halfway"):
            session.generate([new], max_new_tokens=3)
        handle.remove()
        again = session.generate([new], max_new_tokens=3)
    with steered(model, delta, 3.0, scope="generation"):
        expected = kv.generate(model, None, memory, new, max_new_tokens=3)
    assert list(again.tokens) == expected
    assert kv.generate(model, None, memory, new, max_new_tokens=3) == plain


def test_other_sessions_and_threads_are_not_touched() -> None:
    model, tokenizer = model_of("llama")
    delta = delta_of(model)
    memory = kv.capture(model, tokenizer, CONTEXT)
    new = torch.tensor([ids_of(tokenizer, PROMPT)])
    with kv.attach(model, memory) as session:
        plain = session.forward(new)
    with kv.attach(model, memory) as one, kv.attach(model, memory) as two:
        with steered(model, delta, 3.0, session=one):
            half = [one.forward(new[:, :4]), two.forward(new[:, :4])]
            rest = [one.forward(new[:, 4:]), two.forward(new[:, 4:])]
    assert torch.allclose(torch.cat((half[1], rest[1]), dim=1), plain, atol=TOL)
    assert (torch.cat((half[0], rest[0]), dim=1) - plain).abs().max() > 1e-3
    found: list[Any] = []

    def elsewhere() -> None:
        with kv.attach(model, memory) as session:
            found.append(session.forward(new))

    def elsewhere_steered() -> None:
        with steered(model, other, 2.0):
            elsewhere()

    other = delta_of(model, seed=7)
    with steered(model, other, 2.0), kv.attach(model, memory) as session:
        expected = session.forward(new)
    with steered(model, delta, 3.0):
        for target in (elsewhere, elsewhere_steered):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert torch.equal(found[0], plain)
    assert torch.equal(found[1], expected)


def test_two_sessions_keep_their_turns_apart() -> None:
    model, tokenizer = model_of("llama")
    delta = delta_of(model)
    memory = kv.capture(model, tokenizer, CONTEXT)
    prompts = [ids_of(tokenizer, text) for text in (PROMPT, " for the refund and the")]
    alone = []
    for prompt in prompts:
        with steered(model, delta, 3.0, scope="generation"), kv.attach(model, memory) as session:
            alone.append([session.generate([prompt], max_new_tokens=4).tokens for _ in range(2)])
    with (
        steered(model, delta, 3.0, scope="generation"),
        kv.attach(model, memory) as one,
        kv.attach(model, memory) as two,
    ):
        pairs = list(zip((one, two), prompts, strict=True))
        mixed = [[s.generate([p], max_new_tokens=4).tokens for s, p in pairs] for _ in range(2)]
    assert [list(pair) for pair in zip(*mixed, strict=True)] == alone


def test_bias_and_beams_go_along() -> None:
    model, tokenizer = model_of("llama")
    delta = delta_of(model)
    memory = Emphasize({"tokens": (1, 3)}, strength=2.0)(kv.capture(model, tokenizer, CONTEXT))
    new = ids_of(tokenizer, PROMPT)
    with steered(model, delta, 3.0, scope="generation"):
        one = kv.generate(model, None, memory, new, max_new_tokens=4, num_beams=2)
    assert one != kv.generate(model, None, memory, new, max_new_tokens=4, num_beams=2)


def test_refusals_say_what_to_do() -> None:
    model, tokenizer = model_of("llama")
    both = random_delta(model, sites=("values", "residual"), scale=0.1)
    with pytest.raises(
        InvalidArgument, match=r"has values, which live in a memory: kv\.editors\.Steer"
    ):
        with steered(model, both):
            raise AssertionError
    other, _ = tiny_model("llama", seed=5)
    with (
        pytest.raises(IncompatibleModel, match="fingerprints differ"),
        steered(other, delta_of(model)),
    ):
        raise AssertionError
    with pytest.raises(UnknownName, match="steering operator 'ad'"):
        with steered(model, delta_of(model), operator="ad"):  # type: ignore[arg-type]
            raise AssertionError
    with pytest.raises(InvalidArgument, match="scope: expected one of 'all'"):
        with steered(model, delta_of(model), scope="last"):
            raise AssertionError
    with pytest.raises(InvalidArgument, match="0 <= start < stop"):
        Positions(-3)
    with pytest.raises(InvalidArgument, match="strength: expected a finite number"):
        with steered(model, delta_of(model), float("inf")):
            raise AssertionError
    assert Generation() == as_scope("generation")


def test_an_operand_is_taken_as_it_comes_from_a_store() -> None:
    model, tokenizer = model_of("llama")
    delta = delta_of(model)
    ids = torch.tensor([ids_of(tokenizer, CONTEXT)])
    with torch.no_grad():
        with steered(model, delta, 2.0):
            one = model(ids).logits
        with steered(model, delta.operand(), 2.0):
            assert torch.equal(model(ids).logits, one)
