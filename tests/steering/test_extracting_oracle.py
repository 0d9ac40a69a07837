"""Extraction against plain torch: transformers' own cache, own hooks, rotation undone by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvedit.models.cache_argument import cache_argument
from kvedit.models.rope import rotate
from kvedit.steering import Contrast, extract, read_contrast

FAMILIES = ["llama", "gemma3", "gpt_neox", "qwen3", "gpt2"]
SITES = ("keys", "values", "residual", "attention")
PAIRS = [
    ("The answer is slow. First we count, then we add the rest", "The answer is 4."),
    ("First the jar, then the box, so it is nine", "Nine"),
    ("We go step by step here: one, two, and three make six!", "Six, and that is all of it."),
]
# Where each family keeps its blocks and attention, and the base and rotated dims of a layer.
BLOCKS = {"gpt_neox": ("gpt_neox", "layers", "attention"), "gpt2": ("transformer", "h", "attn")}


def _rotation(family, layer):
    """Base, number of rotated dims; None where keys are not rotated."""
    if family == "gpt2":
        return None
    if family == "gemma3":
        return (10_000.0 if layer == 2 else 1_000.0), 16
    return 10_000.0, {"llama": 16, "gpt_neox": 4, "qwen3": 32}[family]


def _turned_back(family, layer, keys, positions):
    """Keys ``[head, token, dim]`` before RoPE: ``k cos - rotate_half(k) sin``."""
    facts = _rotation(family, layer)
    if facts is None:
        return keys
    base, dims = facts
    frequencies = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = torch.outer(positions.double(), frequencies)
    cos, sin = (torch.cat((f(angles),) * 2, dim=-1).float() for f in (torch.cos, torch.sin))
    part, rest = keys[..., :dims], keys[..., dims:]
    half = torch.cat((-part[..., dims // 2 :], part[..., : dims // 2]), dim=-1)
    return torch.cat((part * cos - half * sin, rest), dim=-1)


@torch.no_grad()
def _alone(model, family, ids, start=0):
    """All sites of one context, unpadded: site to list of ``[token, …]``, keys as rotated."""
    base, name, attention = BLOCKS.get(family, ("model", "layers", "self_attn"))
    blocks = getattr(getattr(model, base), name)
    seen = {"residual": [], "attention": []}
    handles = []
    for block in blocks:
        for site, module in (("residual", block), ("attention", getattr(block, attention))):
            handles.append(
                module.register_forward_hook(
                    lambda m, a, out, site=site: seen[site].append(
                        (out[0] if isinstance(out, tuple) else out)[0].clone()
                    )
                )
            )
    cache = DynamicCache()  # without a configuration: keeps all tokens of sliding layers as well
    positions = torch.arange(start, start + len(ids))
    model(ids[None], position_ids=positions[None], **{cache_argument(model): cache})
    for handle in handles:
        handle.remove()
    keys = [layer.keys[0] for layer in cache.layers]
    values = [layer.values[0] for layer in cache.layers]
    return {"keys": keys, "values": values, **seen}, positions


def _tokens(tokenizer, text):
    return tokenizer(text, return_tensors="pt")["input_ids"][0]


def _expected(model, tokenizer, family, text, chosen):
    """Site to layer to the mean over chosen tokens, keys before RoPE."""
    found, positions = _alone(model, family, _tokens(tokenizer, text))
    at = chosen(len(positions))
    result = {}
    for site in SITES:
        result[site] = []
        for layer, states in enumerate(found[site]):
            wide = _turned_back(family, layer, states, positions) if site == "keys" else states
            by_head = site in ("keys", "values")
            result[site].append(wide[:, at].mean(dim=1) if by_head else wide[at].mean(dim=0))
    return result


def _error(found, expected):
    return float((found - expected).norm() / expected.norm())


CHOICES = {
    "last": lambda total: [total - 1],
    -3: lambda total: [total - 3],
    "mean": lambda total: list(range(1, total)),
}


@pytest.mark.parametrize(
    ("family", "read"),
    [
        *((family, "last") for family in FAMILIES),
        *(("llama", -3), ("gpt_neox", -3), ("gemma3", "mean"), ("qwen3", "mean")),
    ],
)
def test_delta_equals_plain_torch_one_context_at_a_time(tiny, family, read):
    model, tokenizer = tiny(family)
    pairs = PAIRS[:2] if read == -3 else PAIRS
    pairs = [(a, b if read != -3 else b + " and more") for a, b in pairs]
    delta = extract(model, tokenizer, pairs, sites=SITES, read=read, batch=4)
    sides = [
        [_expected(model, tokenizer, family, pair[side], CHOICES[read]) for pair in pairs]
        for side in (0, 1)
    ]
    worst = 0.0
    for site in SITES:
        for layer in range(model.config.num_hidden_layers):
            apart = [a[site][layer] - b[site][layer] for a, b in zip(*sides, strict=True)]
            expected = torch.stack(apart).mean(dim=0)
            worst = max(worst, _error(delta.vectors[site][layer], expected))
    print(family, read, f"worst relative error {worst:.1e}")
    assert worst <= 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "smollm3", "glm4", "cohere2"])
def test_keys_are_those_before_the_rotation(tiny, family):
    """No rotation on the reference's side: the output of the key norm, or of the projection."""
    model, tokenizer = tiny(family)
    text, other = "First we count, then we add the rest", "four"
    seen = []
    handles = [
        module.register_forward_hook(lambda m, a, out: seen.append(out[0]))
        for name, module in model.named_modules()
        if name.endswith("k_norm" if family in ("gemma3", "qwen3") else "k_proj")
    ]
    with torch.no_grad():
        model(_tokens(tokenizer, text)[None])
    for handle in handles:
        handle.remove()
    found = read_contrast(model, tokenizer, Contrast.of([(text, other)]), sites="keys")
    assert len(seen) == len(found.layers) == model.config.num_hidden_layers
    for layer, keys in enumerate(seen):
        wide = (
            keys if keys.ndim == 3 else keys.unflatten(-1, found.positive["keys"][layer][0].shape)
        )
        # Norms come behind the split into heads, which they leave before or behind the tokens.
        last = wide[:, -1] if wide.shape[0] == found.positive["keys"][layer].shape[1] else wide[-1]
        torch.testing.assert_close(found.positive["keys"][layer][0], last, atol=1e-6, rtol=1e-6)


def test_a_delta_turned_to_a_position_equals_extraction_there(tiny):
    """Contexts captured so that their last tokens all stand at one position, keys as rotated."""
    for family in ("llama", "gemma3", "gpt_neox", "qwen3"):
        model, tokenizer = tiny(family)
        delta = extract(model, tokenizer, PAIRS, sites=("keys", "values"), batch=3)
        for place in (40, 333):
            for layer in delta.layers:
                means = []
                for side in (0, 1):
                    keys = []
                    for pair in PAIRS:
                        ids = _tokens(tokenizer, pair[side])
                        found, _ = _alone(model, family, ids, start=place + 1 - len(ids))
                        keys.append(found["keys"][layer][:, -1])
                    means.append(torch.stack(keys).mean(dim=0))
                rope = delta.model.layers[layer].rope
                moved = rotate(delta.vectors["keys"][layer][:, None], rope, torch.tensor([place]))
                error = _error(moved[:, 0], means[0] - means[1])
                assert error <= 1e-5, (family, place, layer, error)
