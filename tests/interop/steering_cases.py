"""Deltas of tiny models, made of random numbers, and plain hooks to apply them with."""

import re
from contextlib import chdir, contextmanager
from pathlib import Path

import torch

import kvedit as kv
from kvedit.models.inspection import inspect


def random_delta(model, tokenizer, sites=("residual",), layers=None, seed=0):
    spec = inspect(model, tokenizer).spec
    draw = torch.Generator().manual_seed(seed)
    layers = range(1, len(spec.layers)) if layers is None else layers
    hidden = model.config.get_text_config().hidden_size
    shapes = {
        "keys": lambda i: (spec.layers[i].kv_heads, spec.layers[i].key_dim),
        "values": lambda i: (spec.layers[i].kv_heads, spec.layers[i].value_dim),
    }
    vectors = {
        site: {
            i: torch.randn(shapes.get(site, lambda i: (hidden,))(i), generator=draw) for i in layers
        }
        for site in sites
    }
    return kv.Delta(vectors, spec, {"estimator": "mean", "pairs": 3})


def run_the_card(folder):
    """Runs the lines of torch on the card of a folder, as a user would; returns the ``.pt``."""
    card = Path(folder, "README.md").read_text(encoding="utf-8")
    with chdir(folder):
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    (made,) = Path(folder).glob("*.pt")
    return made


@contextmanager
def hooked(modules):
    """Adds a vector to the output of each module; torch alone."""

    def adding(vector):
        def hook(module, args, output):
            if isinstance(output, tuple):
                return (output[0] + vector, *output[1:])
            return output + vector

        return hook

    handles = [module.register_forward_hook(adding(vector)) for module, vector in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_residual(model, delta, ids):
    """Logits while a delta's vectors are added to what our own tap calls the blocks' output."""
    vectors = delta.vectors["residual"]
    swap = {"hidden": lambda layer, tensor: tensor + vectors[layer]}
    with torch.no_grad(), kv.tap(model, layers=list(vectors), replace=swap):
        return model(ids).logits
