"""Pasta against the paper's equation, and against one full pass that shares only the model."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import (
    Boost,
    Chain,
    Drop,
    Emphasize,
    LLMSteer,
    Pasta,
    ScaleKeys,
    SpotLight,
    build,
)
from kvedit.errors import IncompatibleModel, InvalidArgument, SpanNotFound
from kvedit.memory.heads import HeadSet
from kvedit.runtime import ModelReader
from kvedit.testing.tolerances import FP32_BIAS, FP32_ORACLE, FP64_ORACLE, VISIBLE_EFFECT

FAMILIES = ("llama", "gemma3", "qwen3", "gpt_neox")
PHASES = ("prefill", "decode", "both")
REFERENCES = ("rest_of_memory", "all_others")
SPANS = ("in the box", {"sentence": "The refund"}, {"tokens": (-6, -2)})
HEADS = {0: (1, 2), 2: (0, 3)}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_phase = pytest.mark.parametrize("phase", PHASES)


def wanted_bias(memory: Any, heads: dict[int, Any], reference: str, alpha: float) -> Any:
    """The bias, token by token: log alpha outside of the union, or -log alpha inside."""
    tokens = memory.tokens_count
    inside = {t for span in SPANS for a, b in memory.resolve(span).ranges for t in range(a, b)}
    found = {}
    for layer, chosen in heads.items():
        bias = torch.zeros(memory.model.layers[layer].query_heads, tokens)
        for head in chosen:
            for token in range(tokens):
                if (token in inside) == (reference == "all_others"):
                    bias[head, token] = -math.log(alpha) * (1 if token in inside else -1)
        found[layer] = bias
    return found


def close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    limit = FP64_ORACLE if logits.dtype == torch.float64 else FP32_ORACLE * expected.abs().max()
    assert (logits - expected).abs().max() <= limit


@every_phase
@every_family
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_every_phase_equals_one_full_pass(
    phase: Any,
    family: str,
    reference: Any,
    dtype: Any,
    subject: Any,
    continued: Any,
    full_pass: Any,
) -> None:
    found = subject(family, dtype)
    editor = Pasta(SPANS, 0.05, HeadSet.of(HEADS), reference, phase=phase)
    edited = found.apply(editor)
    bias = wanted_bias(found.memory, HEADS, reference, 0.05)
    before, after = (
        bias if phase in on else {} for on in (("prefill", "both"), ("decode", "both"))
    )
    logits = continued(found.model, edited, found.continuation)
    close(logits, full_pass(found.model, found.memory.tokens, found.continuation, before, after))
    assert (logits - found.logits).abs().max() > VISIBLE_EFFECT
    assert any(layer.bias is not None for layer in edited.layers.values()) == (phase != "prefill")


@every_family
def test_the_phases_differ(family: str, subject: Any, continued: Any) -> None:
    found = subject(family)
    logits = [
        continued(found.model, found.apply(Pasta(SPANS, 0.05, phase=phase)), found.continuation)
        for phase in PHASES
    ]
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert (logits[one] - logits[two]).abs().max() > VISIBLE_EFFECT


@every_family
@pytest.mark.parametrize("reference", REFERENCES)
def test_weights_are_the_paper_s(family: str, reference: Any, subject: Any) -> None:
    """T(A)_ij = A_ij / C_i in G and alpha A_ij / C_i in its complement (eq. 2), by hand."""
    found, alpha = subject(family, torch.float32), 0.03
    edited = found.apply(Pasta(SPANS, alpha, {0: [1, 2]}, reference, phase="decode"))
    patterns = []
    for memory in (found.memory, edited):
        with kv.tap(found.model, "pattern", [0]) as tap, kv.attach(found.model, memory) as session:
            session.forward(found.continuation[None, :3])
        patterns.append(tap["pattern", 0][0])
    plain, steered = patterns
    factor = torch.ones(plain.shape[-1])
    factor[: found.memory.slots] = alpha
    if reference == "all_others":
        factor[:] = alpha
    for span in SPANS:
        for start, stop in found.memory.resolve(span).ranges:
            factor[start:stop] = 1.0
    scaled = plain * factor
    expected = scaled / scaled.sum(dim=-1, keepdim=True)
    assert (steered[[1, 2]] - expected[[1, 2]]).abs().max() <= FP32_BIAS
    assert torch.equal(steered[[0, 3]], plain[[0, 3]])


@pytest.mark.parametrize("reference", REFERENCES)
def test_several_spans_are_one_union(reference: Any, subject: Any) -> None:
    """pastalib adds log alpha outside of each span: n spans lose alpha^(n-1) among each other."""
    memory = subject("llama").memory
    a, b, c = (memory.resolve(span) for span in SPANS)
    edited = Pasta((a, b, c, b), 0.01, reference=reference, phase="decode")(memory)
    one = Emphasize(a | b | c, alpha=0.01, reference=reference)(memory)
    assert edited.digest == one.digest
    bias = edited.layers[1].bias
    assert bias is not None
    away = -1 if reference == "rest_of_memory" else 1
    assert set(bias.unique().tolist()) == {0.0, torch.tensor(away * math.log(100)).item()}
    turned = Pasta((c, a, b), 0.01, reference=reference, phase="decode")(memory)
    assert turned.digest == edited.digest
    overlapping = Pasta(({"tokens": (2, 9)}, {"tokens": (5, 12)}), 0.2, phase="decode")(memory)
    assert overlapping.digest == Pasta({"tokens": (2, 12)}, 0.2, phase="decode")(memory).digest


def test_include_touches_the_spans_and_exclude_the_rest(subject: Any) -> None:
    """pastalib's include takes log alpha from all of the prompt: the rest grows by 1/alpha."""
    memory = subject("llama").memory
    inside = memory.resolve(SPANS[0]).mask(memory.layers[0])
    for reference, touched in (("all_others", inside), ("rest_of_memory", ~inside)):
        bias = Pasta(SPANS[0], 0.1, reference=reference, phase="decode")(memory).layers[0].bias
        assert bias is not None
        assert torch.equal(bias != 0, touched.expand(4, -1))
        assert bool((bias[:, inside] >= 0).all())
        assert bool((bias[:, ~inside] <= 0).all())


@every_family
def test_references_agree_while_the_context_reads_itself(family: str, subject: Any) -> None:
    found = subject(family)
    rest, others = (
        found.apply(Pasta(SPANS, 0.02, reference=reference, phase="prefill"))
        for reference in REFERENCES
    )
    for index in rest.layers:
        gap = rest.layers[index].keys - others.layers[index].keys
        assert gap.abs().max() <= FP64_ORACLE
    moved = rest.layers[2].keys - found.memory.layers[2].keys
    assert moved.abs().max() > VISIBLE_EFFECT


def test_with_sinks_the_references_part(subject: Any) -> None:
    found = subject("gpt_oss")
    rest, others = (
        found.apply(Pasta(SPANS, 0.02, reference=reference, phase="prefill"))
        for reference in REFERENCES
    )
    assert (rest.layers[2].keys - others.layers[2].keys).abs().max() > VISIBLE_EFFECT


@every_family
@pytest.mark.parametrize("reference", REFERENCES)
def test_tokens_before_the_span_read_as_before(family: str, reference: Any, subject: Any) -> None:
    found = subject(family)
    span = found.memory.find("60 days")
    first = span.ranges[0][0]
    edited = found.apply(Pasta(span, 0.01, reference=reference, phase="prefill"))
    for index, layer in edited.layers.items():
        old = found.memory.layers[index]
        assert (layer.keys[:, :first] - old.keys[:, :first]).abs().max() <= FP64_ORACLE
        assert torch.equal(layer.positions, old.positions)
    late = edited.layers[2].values[:, first + 1 :] - found.memory.layers[2].values[:, first + 1 :]
    assert late.abs().max() > VISIBLE_EFFECT


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_alpha_one_reads_the_same_memory(family: str, subject: Any) -> None:
    found = subject(family)
    again = found.apply(Pasta(SPANS, 1.0, phase="both"))
    for index, layer in again.layers.items():
        assert layer.bias is None
        gap = layer.keys - found.memory.layers[index].keys
        assert gap.abs().max() <= FP64_ORACLE


def test_earlier_bias_and_rules_stay(subject: Any) -> None:
    found = subject("llama")
    first = Emphasize("That is", strength=1.5)(SpotLight("box", 0.3)(found.memory))
    baked = found.apply(Pasta(SPANS, phase="prefill"), first)
    assert baked.rules == first.rules
    for index, layer in baked.layers.items():
        assert torch.equal(layer.bias, first.layers[index].bias)
    both = found.apply(Pasta(SPANS, 0.5, {1: [0]}, "all_others", phase="both"), first)
    inside = found.memory.resolve(SPANS[0]).mask(found.memory.layers[1])
    gained = both.layers[1].bias - first.layers[1].bias
    assert torch.allclose(gained[0, inside], torch.tensor(math.log(2)))
    assert bool((gained[1:] == 0).all())


@every_family
def test_reading_in_pieces_is_reading_at_once(
    family: str, subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, editor = subject(family), Pasta(SPANS, 0.05, HEADS, phase="prefill")
    whole = found.apply(editor)
    monkeypatch.setattr("kvedit.runtime.reading._PIECE", 7)
    pieces = found.apply(editor)
    assert found.memory.tokens_count > 14
    for index, layer in whole.layers.items():
        assert (layer.keys - pieces.layers[index].keys).abs().max() <= FP64_ORACLE
        assert (layer.values - pieces.layers[index].values).abs().max() <= FP64_ORACLE


@every_family
def test_a_batch_with_padding(family: str, subject: Any, continued: Any) -> None:
    """Two memories of different length, two prompts of different length: each as if alone."""
    found = subject(family)
    short = kv.capture(found.model, found.tokenizer, "The refund window is 60 days.")
    editor = Pasta("60 days", 0.02, HEADS, "all_others", phase="both")
    memories = [found.apply(editor), found.apply(editor, short)]
    ids = found.continuation
    rows = torch.stack((ids[:6], torch.cat((torch.zeros(3, dtype=torch.int64), ids[:3]))))
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, :3] = False
    with kv.attach(found.model, memories) as session:
        together = session.forward(rows, valid)
    for row, count in ((0, 6), (1, 3)):
        with kv.attach(found.model, memories[row]) as session:
            alone = session.forward(ids[None, :count])[0]
        assert (together[row, -count:] - alone).abs().max() <= FP64_ORACLE


def test_a_head_file_of_pastalib(tmp_path: Any, subject: Any) -> None:
    memory = subject("llama").memory
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"0": [3], "2": [0, 1]}))
    edited = Pasta("60 days", heads=HeadSet.read_pasta(path), phase="decode")(memory)
    steered = [
        (index, head)
        for index, layer in edited.layers.items()
        for head in range(4)
        if layer.bias is not None and bool(layer.bias[head].any())
    ]
    assert steered == [(0, 3), (2, 0), (2, 1)]
    group = Pasta("60 days", heads=HeadSet.of({2: [0]}, "kv"), phase="decode")(memory)
    assert torch.equal(group.layers[2].bias, edited.layers[2].bias)
    node = edited.lineage.head
    assert node is not None
    assert build(node.name, **json.loads(node.parameters))(memory).digest == edited.digest


def test_only_decode_does_without_the_model(subject: Any) -> None:
    memory = subject("llama").memory
    assert [Pasta("box", phase=p).reproducibility for p in PHASES] == ["reader", "pure", "reader"]
    chain = Chain((Pasta("box", phase="decode"), Pasta("box", phase="both")))
    assert chain.reproducibility == "reader"
    for editor in (Pasta("box", phase="prefill"), chain):
        with pytest.raises(InvalidArgument, match="reads with the model: pass reader="):
            editor(memory)


def test_what_can_not_be_read_anew_is_refused(subject: Any) -> None:
    found = subject("gemma3")
    editor = Pasta("60 days", phase="prefill")
    windowed = subject("gemma3", window="windowed").memory
    for memory in (Drop("box")(found.memory), windowed):
        with pytest.raises(InvalidArgument, match="only a captured memory can be read anew"):
            found.apply(editor, memory)
    other = subject("llama")
    reader = ModelReader(other.model, other.tokenizer)
    with pytest.raises(IncompatibleModel, match="made by another model"):
        editor(subject("qwen3").memory, reader=reader)


@pytest.mark.parametrize("phase", ["prefill", "both"])
def test_reading_anew_does_not_undo_an_edit_of_keys(phase: Any, subject: Any) -> None:
    """The tokens know nothing of keys that were changed: the order is the other one."""
    found = subject("llama")
    again, scale = Pasta("box", phase=phase), ScaleKeys("60 days", 2.0)
    bake = LLMSteer(4.0, fraction=0.5, apply="baked")
    for first in (scale, bake, Chain((scale,)), Boost("box", 2.0, phase="prefill")):
        message = f"{type(first).__name__} changed keys or values"
        with pytest.raises(InvalidArgument, match=message):
            found.apply(again, found.apply(first))
        with pytest.raises(InvalidArgument, match=message):
            found.apply(Chain((first, again)))
    turned = found.apply(Chain((again, scale)))
    assert turned.digest == scale(found.apply(again)).digest
    biased = found.apply(Chain((Boost("box", 2.0, phase="decode"), again)))
    assert biased.layers[0].bias is not None


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"phase": "decoding"}, "'prefill', 'decode' or 'both', found 'decoding'"),
        ({"phase": None}, "'prefill', 'decode' or 'both', found None"),
        ({"alpha": 0}, r"alpha must lie in \(0, 1\], found 0"),
        ({"alpha": 1.5}, r"alpha must lie in \(0, 1\], found 1.5"),
        ({"alpha": math.nan}, "alpha: expected a finite number, found nan"),
        ({"alpha": "1"}, "alpha: expected a finite number, found '1'"),
        ({"alpha": True}, "alpha: expected a finite number, found True"),
        ({"reference": "rest"}, "'rest_of_memory' or 'all_others', found 'rest'"),
        ({"spans": ()}, "expected at least one span, found none"),
        ({"spans": ("box", 3)}, "a text or a mapping of .*found 3"),
        ({"heads": 3}, r"expected heads as .*found 3"),
        ({"heads": {"0": [-1]}}, "count from 0, found -1"),
        ({"heads": {}}, "at least one head"),
    ],
    ids=str,
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"spans": "box", "phase": "decode", **parameters}
    with pytest.raises(InvalidArgument, match=message):
        Pasta(**given)


def test_the_phase_has_no_default() -> None:
    with pytest.raises(InvalidArgument, match="phase"):
        build("pasta", spans="box")


def test_what_memory_and_model_lack(subject: Any) -> None:
    memory = subject("llama").memory
    for editor, error, message in (
        (Pasta(("box", "boxes"), phase="decode"), SpanNotFound, "nothing matches text='boxes'"),
        (Pasta("box", heads={9: [0]}, phase="decode"), InvalidArgument, "3 layers, found 9"),
        (Pasta("box", heads={0: [7]}, phase="decode"), InvalidArgument, "4 query heads, found"),
        (
            Pasta(("box", {"slots": (0, 2)}), phase="decode"),
            InvalidArgument,
            "can't join a span of tokens with one of slots",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            editor(memory)
    gone = Drop("60 days")(memory)
    with pytest.raises(SpanNotFound, match=r"none of the layers .* holds a slot"):
        Pasta(("box", "60 days"), phase="decode")(gone)
