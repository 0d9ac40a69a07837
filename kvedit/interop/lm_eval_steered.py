"""Steering vectors for lm-evaluation-harness's model ``steered``. Written only.

It reads a ``.pt`` file by ``torch.save``, the name of a module below ``model.base_model`` to
``action``, ``steering_vector``, ``steering_coefficient``, ``bias`` and ``head_index``, and adds
coefficient times vector to that module's output at every position of every pass. (A CSV names
features of sparse autoencoders, and no vectors.) kvedit writes no pickle: it writes the vectors as
safetensors, the rest as JSON, and beside them the lines of torch that make the ``.pt`` of both.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.interop.card import card
from kvedit.interop.directions import delta_parts, hidden_size
from kvedit.interop.exported import Exported
from kvedit.interop.files import new_folder
from kvedit.interop.live import spec_of
from kvedit.interop.tensors import read_tensors, write_tensors
from kvedit.memory import Delta, KVMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CHECKPOINT", "HOOKS", "TENSORS", "hook_names", "to_lm_eval"]

TENSORS, HOOKS, CARD = "steering.safetensors", "steering.json", "README.md"
CHECKPOINT = "steering.pt"

_SITES = ("residual", "attention")
_NOTES = (
    f"{CARD} has the lines that make the .pt",
    "lm-eval adds it at every position, padding and prompt included",
)

_USE = """\
`{tensors}` has {count} steering vectors, named by the module that each is added behind
(`{first}` and so on), and `{hooks}` says for each module what is done there, and how strongly
(`steering_coefficient`).

The model `steered` of lm-evaluation-harness reads a `.pt` file, which is a pickle. This folder
holds none: a pickle can run anything on the machine that opens it, and lm-eval opens it with
`weights_only=False`. Make the `.pt` yourself, where it is needed:

```python
import json

import torch
from safetensors.torch import load_file

with open("{hooks}", encoding="utf-8") as file:
    hooks = json.load(file)
for name, tensor in load_file("{tensors}").items():
    hook, part = name.rsplit(".", 1)
    hooks[hook][part] = tensor
torch.save(hooks, "{checkpoint}")
```

```bash
lm_eval --model steered --model_args pretrained=MODEL,steer_path={checkpoint} --tasks TASKS
```

The vectors are added at every position of every pass, padding and prompt included.
"""


def to_lm_eval(
    delta: Delta | KVMemory,
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    strength: float = 1.0,
    strict: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Returns what it wrote: a delta as what lm-evaluation-harness's ``steered`` model adds.

    Args:
        delta: the delta, or the operand that a store gave: residual and attention only.
        folder: the folder to make. Its card has the lines that make the ``.pt``.
        model: the model, which knows the names of its modules.
        tokenizer: its tokenizer, for the fingerprint.
        strength: the coefficient of every vector.
        strict: whether the delta must be of this very model; shapes always must fit.
        overwrite: whether such a folder that is there already is replaced.

    Raises:
        InvalidArgument: if it has vectors that the format can't say, or the folder exists.
        IncompatibleModel: if another model made the delta, with both fingerprints.
    """
    if Path(folder).suffix in (".pt", ".pth"):
        raise InvalidArgument(
            f"{folder}: kvedit writes no pickle. Name a folder; the {CARD} in it has the lines of "
            "torch that make the .pt"
        )
    if not math.isfinite(strength):
        raise InvalidArgument(f"strength must be a finite number, found {strength}")
    whole, vectors = delta_parts(delta, "lm-eval's steered model", _SITES)
    spec = spec_of(model, tokenizer)
    if strict:
        whole.require_same_model(spec)
    if whole.hidden != hidden_size(model):
        raise InvalidArgument(
            f"vectors of {whole.hidden} numbers do not fit a hidden size of {hidden_size(model)}"
        )
    named = _named(vectors, model)
    hooks = {name: _hook(strength) for name in named}
    tensors = {f"{name}.steering_vector": vector for name, vector in named.items()}
    facts = {"fingerprint": spec.to_json()["fingerprint"], "content": whole.digest}
    with new_folder(folder, overwrite, (TENSORS, HOOKS, CARD)) as work:
        write_tensors(work / TENSORS, tensors, facts)
        (work / HOOKS).write_text(json.dumps(hooks, indent=2) + "\n", encoding="utf-8")
        (work / CARD).write_text(_card(tensors, spec.name), encoding="utf-8")
        # There is no reader of ours that a verb could compare with.
        _check(work, tensors, hooks, Path(folder))
    return Exported(Path(folder), "lm_eval", 0, 0, _NOTES)


def hook_names(model: PreTrainedModel, site: str) -> dict[int, str]:
    """Returns layer to the name, below ``model.base_model``, of the module that a site is behind.

    Args:
        model: the model.
        site: ``"residual"``, the layer's block, or ``"attention"``, its attention.

    Raises:
        UnsupportedModel: if a layer stands in no list of layers.
    """
    from kvedit.models.inspection import inspect
    from kvedit.runtime.places import block_of

    names = {id(module): name for name, module in model.base_model.named_modules()}
    found = {}
    for layer, attention in inspect(model).attention.items():
        module = attention if site == "attention" else block_of(model, attention)
        found[layer] = names[id(module)]
    return found


def _named(
    vectors: dict[str, dict[int, torch.Tensor]], model: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """Returns name of a module to the vector that is added behind it."""
    names = {site: hook_names(model, site) for site in vectors}
    return {
        names[site][layer]: vector
        for site, layers in vectors.items()
        for layer, vector in layers.items()
    }


def _hook(strength: float) -> dict[str, Any]:
    # Their code takes no bias where it adds.
    return {
        "action": "add",
        "steering_coefficient": float(strength),
        "bias": None,
        "head_index": None,
    }


def _card(tensors: dict[str, torch.Tensor], name: str) -> str:
    use = _USE.format(
        tensors=TENSORS,
        hooks=HOOKS,
        checkpoint=CHECKPOINT,
        count=len(tensors),
        first=next(iter(tensors)),
    )
    title = f"Steering vectors for {name}"
    return card(title, use, name, "lm-eval", ("steering-vectors",), holds_text=False)


def _check(
    work: Path, tensors: dict[str, torch.Tensor], hooks: dict[str, Any], place: Path
) -> None:
    again = read_tensors(work / TENSORS).tensors
    same = set(again) == set(tensors) and all(
        torch.equal(again[name], tensor) for name, tensor in tensors.items()
    )
    if not same or json.loads((work / HOOKS).read_text(encoding="utf-8")) != hooks:
        raise CorruptMemory(f"{place}: what was read back is not what was written")
