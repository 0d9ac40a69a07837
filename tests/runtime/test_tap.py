"""kv.tap: what it shows is what attention used; what it replaces is what attention uses."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.editors import Emphasize
from kvedit.errors import InvalidArgument, ShapeMismatch, UnknownName, UnsupportedModel
from kvedit.models import inspect
from kvedit.models.cache_argument import cache_argument
from kvedit.runtime import SITES

TEXT = "The refund window is 60 days. Please keep the receipt."


def _ids(tokens, seed=0, rows=1):
    return torch.randint(10, 300, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "opt"])
def test_pattern_equals_eager_attentions_on_every_backend(tiny, family):
    model, _ = tiny(family, "eager")
    ids = _ids(20)
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
    for attn in ("eager", "sdpa"):
        if family in ("gemma2", "gpt_oss") and attn == "sdpa":
            continue
        other, _ = tiny(family, attn)
        with kv.tap(other, ("pattern", "received", "scores")) as tap, torch.no_grad():
            other(ids)
        for layer, pattern in enumerate(expected):
            torch.testing.assert_close(tap["pattern", layer], pattern, atol=2e-6, rtol=0)
            torch.testing.assert_close(tap["received", layer], pattern.sum(2), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "cohere2", "phi3", "gpt2"])
def test_sites_before_rope_are_the_projections(tiny, family):
    """The layer's own projection (and norm) modules, hooked, are the reference."""
    model, _ = tiny(family)
    ids = _ids(15)
    module = inspect(model).attention[0]
    spec = inspect(model).spec.layers[0]
    seen = {}
    names = {
        "qwen3": ("q_norm", "k_norm"),
        "llama": ("q_proj", "k_proj"),
        "cohere2": ("q_proj", "k_proj"),
    }.get(family)
    with kv.tap(model, ("queries_pre", "keys_pre", "keys"), [0]) as tap, torch.no_grad():
        if names:
            handles = [
                getattr(module, name).register_forward_hook(
                    lambda m, a, out, name=name: seen.__setitem__(name, out)
                )
                for name in names
            ]
        model(ids, position_ids=torch.arange(7, 22)[None])
    assert tap["keys_pre", 0].shape == (1, spec.kv_heads, 15, spec.key_dim)
    if family == "gpt2":
        assert torch.equal(tap["keys_pre", 0], tap["keys", 0])
    if names:
        for handle in handles:
            handle.remove()
        for site, name, heads in zip(
            ("queries_pre", "keys_pre"), names, (spec.query_heads, spec.kv_heads), strict=True
        ):
            raw = seen[name].reshape(1, 15, heads, spec.key_dim).transpose(1, 2)
            torch.testing.assert_close(tap[site, 0], raw, atol=2e-5, rtol=0)
        assert (tap["keys_pre", 0] - tap["keys", 0]).abs().max() > 1e-3


def test_sites_in_a_session_know_positions(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    with kv.tap(model, ("keys", "keys_pre", "queries_pre"), [0]) as tap:
        with kv.attach(model, memory) as session:
            session.forward(_ids(3))
    whole = torch.cat((memory.tokens, _ids(3)[0]))[None]
    with kv.tap(model, ("keys_pre", "queries_pre"), [0]) as plain, torch.no_grad():
        model(whole)
    torch.testing.assert_close(tap["keys_pre", 0], plain["keys_pre", 0], atol=2e-5, rtol=0)
    torch.testing.assert_close(
        tap["queries_pre", 0], plain["queries_pre", 0][:, :, -3:], atol=2e-5, rtol=0
    )
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(whole, **{cache_argument(model): cache})
    with kv.tap(model, ("keys_pre",), [0]), torch.no_grad():
        with pytest.raises(UnsupportedModel, match="keep none"):
            model(
                _ids(1),
                **{cache_argument(model): cache},
                position_ids=torch.tensor([[whole.shape[1]]]),
            )


def test_group_mass_and_bias(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    span = memory.find("60 days")
    mask = span.mask(memory.layers[0])
    groups = {"rule": span, "mask": mask}
    masses = []
    for one in (memory, Emphasize(span=span, strength=1.0)(memory)):
        with kv.tap(model, ("mass", "pattern"), [0], groups=groups) as tap:
            with kv.attach(model, one) as session:
                session.forward(_ids(4))
        inside = torch.nn.functional.pad(mask, (0, 4))
        expected = tap["pattern", 0][..., inside].sum(-1)
        torch.testing.assert_close(tap["mass", 0][0], expected, atol=1e-6, rtol=0)
        assert torch.equal(tap["mass", 0][0], tap["mass", 0][1])
        masses.append(tap["mass", 0][0])
    # Odds of the group grow by e^b, exactly.
    odds = [mass.double() / (1 - mass.double()) for mass in masses]
    torch.testing.assert_close(
        odds[1] / odds[0], torch.full_like(odds[0], torch.e), atol=1e-3, rtol=0
    )


def test_hidden_states_equal_transformers_own(tiny):
    for family in ("llama", "gpt2", "gpt_neox", "opt", "gemma3"):
        model, _ = tiny(family)
        with kv.tap(model, ("hidden",)) as tap, torch.no_grad():
            states = model(_ids(9), output_hidden_states=True).hidden_states
        for layer in range(len(states) - 2):
            torch.testing.assert_close(tap["hidden", layer], states[layer + 1], atol=0, rtol=0)


def test_a_reading_tap_changes_nothing_and_holds_clones(tiny):
    model, _ = tiny("llama")
    ids = _ids(8)
    with torch.no_grad():
        expected = model(ids).logits
        with kv.tap(model, tuple(s for s in SITES if s != "mass")) as tap:
            found = model(ids).logits
            first = tap["keys", 0].clone()
            tap["keys", 0].zero_()
            model(_ids(8, seed=1))
    assert torch.equal(found, expected)
    assert len(tap.all("keys", 0)) == 2 and not tap.all("keys", 0)[0].any()
    assert first.any()


@pytest.mark.parametrize(
    "site", ["values", "queries", "keys", "output", "hidden", "pattern", "scores"]
)
def test_replacing_with_the_same_keeps_logits_and_with_another_moves_them(tiny, site):
    model, _ = tiny("gemma3")
    ids = _ids(12)
    with torch.no_grad():
        expected = model(ids).logits
        with kv.tap(model, layers=[1], replace={site: lambda layer, x: x}):
            same = model(ids).logits
        with kv.tap(model, layers=[1], replace={site: lambda layer, x: x.flip(-1)}):
            moved = model(ids).logits
    torch.testing.assert_close(same, expected, atol=1e-4, rtol=0)
    assert (moved - expected).abs().max() > 1e-3


def test_replacing_the_pattern_by_its_closed_form_equals_a_bias(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    span = memory.find("60 days")
    factor = torch.where(span.mask(memory.layers[0]), torch.e**2, 1.0)

    def emphasise(layer, pattern):
        wide = torch.nn.functional.pad(factor, (0, pattern.shape[-1] - len(factor)), value=1.0)
        raised = pattern * wide
        return raised / raised.sum(-1, keepdim=True)

    with kv.attach(model, memory) as session, kv.tap(model, replace={"pattern": emphasise}):
        replaced = session.forward(_ids(5))
    with kv.attach(model, Emphasize(span=span, strength=2.0)(memory)) as session:
        biased = session.forward(_ids(5))
    torch.testing.assert_close(replaced, biased, atol=2e-5, rtol=0)


def test_received_leaves_padding_out(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    valid = torch.tensor([[False, False, True, True]])
    with kv.tap(model, ("received",), [0]) as tap, kv.attach(model, memory) as session:
        session.forward(_ids(4), valid)
    with kv.tap(model, ("received",), [0]) as alone, kv.attach(model, memory) as session:
        session.forward(_ids(4)[:, 2:])
    slots = len(memory.tokens)
    torch.testing.assert_close(
        tap["received", 0][..., :slots], alone["received", 0][..., :slots], atol=1e-5, rtol=0
    )


def test_bad_requests_are_refused(tiny):
    model, _ = tiny("llama")
    for arguments, error, message in (
        ({"sites": ["quarries"]}, UnknownName, "queries"),
        ({"sites": ["keys"], "layers": [7]}, UnknownName, "layer"),
        ({"sites": []}, InvalidArgument, "tap what"),
        ({"sites": ["mass"]}, InvalidArgument, "groups"),
        ({"replace": {"received": abs}}, UnknownName, "replaceable"),
    ):
        with pytest.raises(error, match=message), kv.tap(model, **arguments):
            pass
    with kv.tap(model, replace={"values": lambda layer, x: x[..., :2]}), torch.no_grad():
        with pytest.raises(ShapeMismatch, match="replacement of values"):
            model(_ids(3))
    assert model.config._attn_implementation == "sdpa"
    with kv.tap(model, "keys") as tap:
        pass
    with pytest.raises(UnknownName, match="keys, 0"):
        tap["keys", 0]


def test_a_reader_hands_back_sites(tiny):
    from kvedit.editors import Reader
    from kvedit.runtime import ModelReader

    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    reader = ModelReader(model)
    assert isinstance(reader, Reader)
    found = reader.read(memory, torch.tensor([40, 41]), ["queries", "received"])
    assert found["queries"][2].shape == (1, 4, 2, 16)
    assert found["received"][0].shape[-1] == len(memory.tokens) + 2
