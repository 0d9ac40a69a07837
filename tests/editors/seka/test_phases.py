"""Phases of SEKA against the published way: a plain hook on the module that makes the keys.

The reference shares the model with kvedit, and what was learned. A forward hook on ``k_norm``, or
on the projection, changes keys before RoPE while the model reads; the cache, where there is one,
is transformers'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvedit.editors import AdaSeka, Chain, Drop, Emphasize, Pasta, Seka
from kvedit.editors.seka import learn_experts, learn_projectors, synthetic_triplets
from kvedit.errors import InvalidArgument
from kvedit.memory.operand import operand_facts
from kvedit.models.cache_argument import cache_argument
from kvedit.testing import CONTINUATION
from kvedit.testing.tolerances import VISIBLE_EFFECT

FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox", "cohere2", "gpt2")
SPANS = ("refund window", {"tokens": [-8, -2]}, "The thing")
QUESTION = " and what is that?"
GAINS = (1.5, -0.8)
# At the edge of a map's image the inverse magnifies by thousands what the model's own float32
# angles round. So features go away from it: towards zero, or towards one in the third.
INWARD = {"tanh": (-0.6, -0.3), "elu": (-0.6, -0.3), "squared_exponential": GAINS}
RELATIVE = 1e-5  # of the largest logit, key or value
MAPS = ("none", "tanh", "elu", "squared_exponential")
Steer = Callable[[int, torch.Tensor], torch.Tensor]

every_family = pytest.mark.parametrize("family", FAMILIES)
every_map = pytest.mark.parametrize("name", MAPS)


@functools.cache
def learned(found: Any, name: str = "none") -> Any:
    """Projectors of every layer; every head passes."""
    layers = range(len(found.spec.layers))
    return learn_projectors(
        found.reader, found.spec, synthetic_triplets(seed=3, n=4), layers=layers,
        min_difference=0.0, feature_map=name,
    )  # fmt: skip


@functools.cache
def experts(found: Any) -> Any:
    sets = {"a": synthetic_triplets(1, 3), "b": synthetic_triplets(2, 3)}
    layers = range(len(found.spec.layers))
    return learn_experts(found.reader, found.spec, sets, layers=layers, min_difference=0.0)


def phi(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "tanh":
        return (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())
    if name == "elu":
        return torch.where(x < 0, x.clamp_max(0).exp() - 1, x)
    return torch.exp(-0.5 * x**2) if name == "squared_exponential" else x


def back(y: torch.Tensor, name: str) -> torch.Tensor:
    if name == "tanh":
        y = y.clamp(-0.9999, 0.9999)
        return 0.5 * torch.log((1 + y) / (1 - y))
    if name == "elu":
        return torch.where(y < 0, torch.log(1 + y.clamp(-0.9999, 0)), y)
    return -2 * torch.log(y.clamp_min(1e-4)) if name == "squared_exponential" else y


def parts(found: Any, layer: int) -> tuple[Any, Any, Any]:
    """Modules that make the queries and keys of a layer, and a view of one of their outputs.

    The view is ``[token, head, dim]`` of row 0, and writes through.
    """
    spec = found.spec.layers[layer]
    (attention,) = [
        m for m in found.model.modules()
        if getattr(m, "layer_idx", None) == layer and "ttention" in type(m).__name__
    ]  # fmt: skip
    dim = spec.key_dim

    def fused(output: torch.Tensor, which: int) -> torch.Tensor:
        if hasattr(attention, "c_attn"):  # GPT-2: all queries, then all keys, then all values
            return output[0].view(len(output[0]), 3, -1, dim)[:, which]
        return output[0].view(len(output[0]), -1, 3, dim)[:, :, which]  # GPT-NeoX: head by head

    def alone(output: torch.Tensor, which: int) -> torch.Tensor:
        if output.ndim == 3:
            return output[0].view(len(output[0]), -1, dim)
        heads = spec.kv_heads if which else spec.query_heads
        return output[0].transpose(0, 1) if output.shape[1] == heads else output[0]

    for name in ("query_key_value", "c_attn"):
        if hasattr(attention, name):
            return getattr(attention, name), getattr(attention, name), fused
    kind = "norm" if hasattr(attention, "k_norm") else "proj"
    return getattr(attention, f"q_{kind}"), getattr(attention, f"k_{kind}"), alone


@contextmanager
def hooked(found: Any, steer: Steer, inside: dict[int, torch.Tensor], plain: dict[int, Any]) -> Any:
    """Changes the keys of tokens ``inside``, and notes in ``plain`` what all keys were before."""

    def hook(layer: int, view: Any) -> Any:
        def run(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            changed = output.clone()
            keys = view(changed, 1)
            plain[layer] = keys.clone()
            at = inside[layer].nonzero().flatten()
            keys[at] = steer(layer, keys[at])
            return changed

        return run

    with ExitStack() as stack:
        for layer in inside:
            _, module, view = parts(found, layer)
            stack.callback(module.register_forward_hook(hook(layer, view)).remove)
        yield


def highlighted(found: Any, total: int) -> dict[int, torch.Tensor]:
    """Which tokens of a text that starts with the context are in the spans, by layer."""
    inside = torch.zeros(total, dtype=torch.bool)
    for span in SPANS:
        for start, stop in found.memory.resolve(span).ranges:
            inside[start:stop] = True
    return dict.fromkeys(range(len(found.spec.layers)), inside)


def matrices(operand: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """P+ and P- by layer, float64: an inverse of a feature map magnifies what float32 rounds."""
    found = {}
    for entry in operand_facts(operand, "projectors")["layers"]:
        rows = operand.layers[entry["layer"]].keys.double()
        first = max(entry["positive"])
        plus, lead = (
            torch.einsum("hkd,hke->hde", b, b) for b in (rows[:, :first], rows[:, first:])
        )
        found[entry["layer"]] = (plus, torch.eye(rows.shape[-1]).double() - lead)
    return found


def seka(found: Any, name: str = "none", gains: tuple[float, float] = GAINS) -> Steer:
    """The equation, with matrices: keys [token, kv_head, dim] before RoPE to changed ones."""
    projectors = matrices(learned(found, name))

    def steer(layer: int, keys: torch.Tensor) -> torch.Tensor:
        mapped = phi(keys, name)
        plus, minus = (torch.einsum("thd,hdk->thk", mapped, p) for p in projectors[layer])
        return back(mapped + (gains[0] * plus + gains[1] * minus) / 2, name)

    return steer


def adaseka(found: Any) -> Steer:
    """The same for experts: alpha from the queries of one plain pass over context and question."""
    facts, weighed = operand_facts(experts(found), "experts"), {}
    ids = torch.cat((found.memory.tokens, found.reader.encode(QUESTION)))
    for layer in range(len(found.spec.layers)):
        module, _, view = parts(found, layer)
        kept: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda m, a, out, v=view, k=kept: k.append(v(out, 0)))
        with torch.no_grad():
            found.model(ids[None], use_cache=False)
        handle.remove()
        heads = found.spec.layers[layer].kv_heads
        query = kept[0][-1].view(heads, -1, kept[0].shape[-1]).mean(dim=1)
        u = experts(found).layers[layer].keys.double()
        u = u.view(heads, len(facts["names"]), facts["rank"], -1)[:, :, :3]
        score = torch.einsum("hd,hmkd->hm", query, u)
        alpha = score / score.abs().amax(dim=1, keepdim=True)
        unit = u / u.norm(dim=-1, keepdim=True)
        weighed[layer] = torch.einsum("hm,hmkd,hmke->hde", alpha, unit, unit)
    return lambda layer, keys: keys + 0.8 * torch.einsum("thd,hde->the", keys, weighed[layer])


def assert_close(mine: torch.Tensor, reference: torch.Tensor) -> None:
    assert (mine - reference).abs().max() <= RELATIVE * reference.abs().max()


def check_both(found: Any, edited: Any, steer: Steer, continued: Any) -> None:
    """One pass over context and continuation with the hook, as the published code generates."""
    following = found.reader.encode(CONTINUATION)
    ids = torch.cat((found.memory.tokens, following))
    with hooked(found, steer, highlighted(found, len(ids)), {}), torch.no_grad():
        reference = found.model(ids[None], use_cache=False).logits[0, -len(following) :]
    mine = continued(found.model, edited, following)
    assert_close(mine, reference)
    plain = continued(found.model, found.memory, following)
    assert (mine - plain).abs().max() > VISIBLE_EFFECT


def check_prefill(found: Any, edited: Any, steer: Steer, continued: Any) -> None:
    """The context read under the hook; then its keys are put back, rotated by hand."""
    following, tokens = found.reader.encode(CONTINUATION), found.memory.tokens
    cache, plain = DynamicCache(), {}
    with hooked(found, steer, highlighted(found, len(tokens)), plain), torch.no_grad():
        found.model(tokens[None], use_cache=True, **{cache_argument(found.model): cache})
    for layer, keys in plain.items():
        turned = np.stack(
            [found.rotation(layer, t) @ keys[t].double().numpy().T for t in range(len(tokens))]
        )  # [token, dim, kv_head]
        kept = cache.layers[layer]
        kept.keys = torch.tensor(turned).permute(2, 0, 1)[None].to(kept.keys.dtype)
        assert_close(edited.layers[layer].keys, kept.keys[0])
        assert_close(edited.layers[layer].values, kept.values[0])
    at = torch.arange(len(tokens), len(tokens) + len(following))[None]
    with torch.no_grad():
        reference = found.model(
            following[None], position_ids=at, **{cache_argument(found.model): cache}
        ).logits[0]
    assert_close(continued(found.model, edited, following), reference)


@every_map
@every_family
def test_both_is_the_published_hook(family: str, name: Any, bench: Any, continued: Any) -> None:
    found, gains = bench(family), INWARD.get(name, GAINS)
    editor = Seka(SPANS, *gains, feature_map=name, phase="both")
    edited = editor(found.memory, learned(found, name), reader=found.reader)
    check_both(found, edited, seka(found, name, gains), continued)


@every_family
def test_prefill_keeps_unchanged_keys(family: str, bench: Any, continued: Any) -> None:
    found = bench(family)
    editor = Seka(SPANS, *GAINS, phase="prefill")
    edited = editor(found.memory, learned(found), reader=found.reader)
    check_prefill(found, edited, seka(found), continued)


@every_family
def test_adaseka_has_the_phases_too(family: str, bench: Any, continued: Any) -> None:
    found = bench(family)
    both, prefill = (
        AdaSeka(SPANS, QUESTION, 0.8, phase=phase)(
            found.memory, experts(found), reader=found.reader
        )
        for phase in ("both", "prefill")
    )
    check_both(found, both, adaseka(found), continued)
    check_prefill(found, prefill, adaseka(found), continued)


@every_family
def test_both_is_prefill_then_decode(family: str, bench: Any) -> None:
    """The keys that are kept are those that the context read."""
    found = bench(family)
    made = {
        phase: Seka(SPANS, *GAINS, phase=phase)(found.memory, learned(found), reader=found.reader)
        for phase in ("prefill", "decode", "both")
    }
    for layer, both in made["both"].layers.items():
        again = Seka(SPANS, *GAINS, layers=(layer,))(made["prefill"], learned(found))
        assert torch.equal(again.layers[layer].keys, both.keys)
        assert torch.equal(made["prefill"].layers[layer].values, both.values)
    last = made["both"].layers[len(found.spec.layers) - 1]
    for other in ("prefill", "decode"):
        assert (last.keys - made[other].layers[len(found.spec.layers) - 1].keys).abs().max() > 1e-3


@every_family
def test_reading_in_pieces_is_reading_at_once(
    family: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bench(family)
    editor = Seka(SPANS, *GAINS, phase="both")
    whole = editor(found.memory, learned(found), reader=found.reader)
    monkeypatch.setattr("kvedit.runtime.reading._PIECE", 7)
    pieces = editor(found.memory, learned(found), reader=found.reader)
    for layer, kept in whole.layers.items():
        assert_close(pieces.layers[layer].keys, kept.keys)
        assert_close(pieces.layers[layer].values, kept.values)


def test_nothing_before_the_span_changes(bench: Any) -> None:
    found = bench("qwen3")
    first = found.memory.resolve("refund window").ranges[0][0]
    editor = Seka("refund window", *GAINS, phase="both")
    edited = editor(found.memory, learned(found), reader=found.reader)
    for layer, kept in edited.layers.items():
        old = found.memory.layers[layer]
        assert_close(kept.keys[:, :first], old.keys[:, :first])
        assert_close(kept.values[:, :first], old.values[:, :first])
    moved = (edited.layers[2].values - found.memory.layers[2].values).abs().amax(dim=(0, 2))
    assert moved[first + 1 :].min() > 1e-6


def test_decode_is_the_default_and_needs_no_model(bench: Any) -> None:
    found = bench("llama")
    assert Seka("a") == Seka("a", phase="decode")
    assert AdaSeka("a", "b") == AdaSeka("a", "b", phase="decode")
    kinds = [Seka("a", phase=phase).reproducibility for phase in ("prefill", "decode", "both")]
    assert kinds == ["reader", "pure", "reader"]
    for phase in ("prefill", "both"):
        with pytest.raises(InvalidArgument, match="reads with the model: pass reader="):
            Seka("box", phase=phase)(found.memory, learned(found))
    with pytest.raises(InvalidArgument, match="'prefill', 'decode' or 'both', found 'now'"):
        Seka("a", phase="now")


def test_bias_and_rules_stay_and_edits_of_keys_are_not_undone(bench: Any) -> None:
    found = bench("llama")
    editor = Seka("60 days", phase="both")
    biased = Emphasize("box", strength=1.0)(found.memory)
    edited = editor(biased, learned(found), reader=found.reader)
    assert all(torch.equal(edited.layers[i].bias, biased.layers[i].bias) for i in edited.layers)
    for again in (editor, Pasta("box", phase="prefill")):
        inputs = (edited, learned(found)) if again is editor else (edited,)
        with pytest.raises(InvalidArgument, match="Seka changed keys or values"):
            again(*inputs, reader=found.reader)
    with pytest.raises(InvalidArgument, match="only a captured memory can be read anew"):
        editor(Drop("box")(found.memory), learned(found), reader=found.reader)
    chain = Chain((Emphasize("box", strength=1.0), editor))
    assert chain.reproducibility == "reader"
    assert chain(found.memory, learned(found), reader=found.reader).digest == edited.digest


def test_the_model_is_as_before(bench: Any) -> None:
    found = bench("gemma3")
    ids, digest = found.reader.encode(CONTINUATION), found.memory.digest
    with torch.no_grad():
        before = found.model(ids[None]).logits
        Seka(SPANS, phase="both")(found.memory, learned(found), reader=found.reader)
        assert torch.equal(found.model(ids[None]).logits, before)
    found.memory.check_unmodified()
    assert found.memory.digest == digest
