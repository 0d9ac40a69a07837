"""Cartridges of HazyResearch/cartridges and Tokasaurus: ``.pt`` read, safetensors written.

Their file is a pickle by ``torch.save``: ``trainable_keys``, ``trainable_values``, ``frozen_keys``
and ``frozen_values`` (``fixed_…`` in Tokasaurus), each a list of one tensor ``[1, KV heads, slots,
head size]`` per layer, keys after norm and RoPE. The first query stands at position p. kvedit
writes no pickle: it writes the same tensors as safetensors, and beside them the lines of torch that
turn them into a ``.pt`` on the other side.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from kvedit.errors import InvalidArgument
from kvedit.interop.card import PRIVACY, card
from kvedit.interop.checkpoints import read_checkpoint
from kvedit.interop.exported import Exported
from kvedit.interop.fetching import local_folder
from kvedit.interop.files import new_folder
from kvedit.interop.hazy_tensors import listed, named, to_prefix
from kvedit.interop.live import check_made_for, import_node, memory_of, spec_of, use_dtype
from kvedit.interop.prefix import Prefix, Refit, prefix_of
from kvedit.interop.tensors import read_tensors, write_tensors
from kvedit.memory import KVMemory, ModelSpec, Source
from kvedit.memory.digest import digest_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CHECKPOINT", "PAGE", "TENSORS", "from_hazy", "to_hazy"]

TENSORS, CARD, CHECKPOINT = "cartridge.safetensors", "README.md", "cartridge.pt"

PAGE = 16
"""Slots of a page of Tokasaurus, which serves whole pages only."""

_FAMILIES = ("llama", "qwen3")

_USE = """\
`{tensors}` has the tensors of a cartridge by the names that HazyResearch/cartridges gives them,
`trainable_keys.0` to `frozen_values.{last}`: {slots} slots in {layers} layers, of which the first
{frozen} are frozen. The first token of the prompt stands at position {slots}.

Their code reads a `.pt` file, which is a pickle. This folder holds none: a pickle can run
anything on the machine that opens it. Make the `.pt` yourself, where it is needed:

```python
import torch
from safetensors.torch import load_file

tensors = load_file("{tensors}")
parts = {{}}
for part in ("trainable", "frozen"):
    for kind in ("keys", "values"):
        name = f"{{part}}_{{kind}}"
        layers = sum(key.startswith(name + ".") for key in tensors)
        parts[name] = torch.nn.ParameterList(
            torch.nn.Parameter(tensors[f"{{name}}.{{layer}}"], requires_grad=part == "trainable")
            for layer in range(layers)
        )
torch.save(parts, "{checkpoint}")
```

Their loader takes the number of KV heads for the number of frozen slots when it goes on training
(`size(1)` for `size(2)`, their issue 23). Serving is not touched by that.

Tokasaurus wants the file as `cartridges/<id>/{checkpoint}`, with a `config.yaml` of its own beside
it, and serves whole pages of {page} slots: {pages}
"""


def to_hazy(
    memory: KVMemory,
    folder: str | os.PathLike[str],
    *,
    frozen: int = 1,
    dtype: torch.dtype | str | None = None,
    remainder: Literal["keep", "refuse", "drop"] = "keep",
    refit: Refit | None = None,
    overwrite: bool = False,
) -> Exported:
    """Returns what it wrote: a memory as the tensors of a cartridge.

    Args:
        memory: the memory; keys are turned so that the first query stands at position p.
        folder: the folder to make.
        frozen: leading slots that training leaves alone.
        dtype: of the file: float32, bfloat16 (theirs) or float16; None keeps the memory's.
        remainder: what to do if the slots are no multiple of :data:`PAGE`. Tokasaurus cuts off
            what is left over, and then asks from positions that the keys were not made for.
            ``"keep"`` says so in the notes; ``"refuse"`` raises; ``"drop"`` leaves the last slots
            out before the keys are turned, which loses what they hold and keeps positions right.
            There is no lossless padding: a slot that draws no attention needs bias.
        refit: called where the memory has bias: returns it without, values fitted anew.
        overwrite: whether such a folder that is there already is replaced.

    Raises:
        InvalidArgument: if the format can't say what the memory does, or the folder exists.
        UnsupportedModel: if the memory would have to move and can't.
    """
    if remainder not in ("keep", "refuse", "drop"):
        raise InvalidArgument(f"remainder must be keep, refuse or drop, found {remainder!r}")
    kept, notes = _whole_pages(memory, remainder)
    prefix = prefix_of(kept, dtype, refit, frozen)
    facts = {
        "fingerprint": memory.model.to_json()["fingerprint"],
        "content": memory.digest,
        "moved": prefix.moved,
    }
    if memory.model.family not in _FAMILIES:
        notes += (f"their code runs {' and '.join(_FAMILIES)} only, not {memory.model.family}",)
    with new_folder(folder, overwrite, (TENSORS, CARD)) as work:
        write_tensors(work / TENSORS, named(prefix), facts)
        (work / CARD).write_text(_card(prefix, memory.model.name), encoding="utf-8")
    return Exported(Path(folder), "hazy", prefix.slots, prefix.moved, (*notes, PRIVACY))


def from_hazy(
    place: str | os.PathLike[str],
    model: PreTrainedModel | ModelSpec,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    source: Source | None = None,
    strict: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> KVMemory:
    """Returns the memory of a cartridge: positions 0 to p - 1, the first query at p.

    Args:
        place: a ``.pt`` file, a folder with one (or with what :func:`to_hazy` wrote), or a
            repository on the hub.
        model: the model that it was trained for, or its facts; the file does not name it.
        tokenizer: its tokenizer, for the fingerprint.
        dtype: of keys and values; None takes the model's, or the file's where only facts are
            given.
        source: the text that it stands for, which the format does not hold.
        strict: whether a file of ours must be of this very model; shapes always must fit.
        revision: of a repository.
        token: for a private repository.

    Raises:
        InvalidArgument: if there is no such file, or it holds no cartridge.
        ShapeMismatch: if it does not fit the model.
        IncompatibleModel: if a file of ours names another model.
        CorruptMemory: if it can't be read, or holds anything but tensors; nothing of it is run.
    """
    path, origin = _file(Path(place), place, revision, token)
    if path.suffix == ".safetensors":
        read = read_tensors(path)
        lists, digest, facts = listed(read.tensors, str(path)), read.digest, read.facts
    else:
        lists, facts = read_checkpoint(path), {}
        digest = digest_bytes(path.read_bytes())
    spec = spec_of(model, tokenizer)
    check_made_for(facts, spec, strict, str(path))
    prefix = to_prefix(lists, spec, str(path))
    # The name of a file may say what is in it; its digest does not.
    node = import_node(
        "hazy", {path.suffix.lstrip("."): digest}, {"frozen": prefix.frozen, **origin}
    )
    return memory_of(prefix, spec, node, use_dtype(model, dtype), source)


def _whole_pages(memory: KVMemory, remainder: str) -> tuple[KVMemory, tuple[str, ...]]:
    memory.check_unmodified()
    left = memory.slots % PAGE
    if len({layer.slots for layer in memory.layers.values()}) > 1:
        return memory, ()  # which is refused later on, with the reason
    if not left or remainder == "keep":
        note = f"Tokasaurus serves pages of {PAGE} slots and will cut off the last {left}"
        return memory, (note,) if left else ()
    whole = memory.slots - left
    if remainder == "refuse" or not whole:
        raise InvalidArgument(
            f"{memory.slots} slots are no multiple of {PAGE}, and Tokasaurus would cut off the "
            f"last {left}: make a cartridge of {f'{whole} or ' * bool(whole)}{whole + PAGE} slots"
            + (", or drop them here (remainder='drop')" if whole else "")
        )
    first = torch.arange(whole)
    layers = {index: layer.select(first) for index, layer in memory.layers.items()}
    return memory.with_layers(layers), (f"the last {left} slots were left out",)


def _card(prefix: Prefix, name: str) -> str:
    left = prefix.slots % PAGE
    cut = f"it will cut off the last {left} of these {prefix.slots}, without an error."
    use = _USE.format(
        tensors=TENSORS,
        checkpoint=CHECKPOINT,
        slots=prefix.slots,
        layers=len(prefix.keys),
        last=len(prefix.keys) - 1,
        frozen=prefix.frozen,
        page=PAGE,
        pages=cut if left else f"these are {prefix.slots // PAGE}.",
    )
    return card(f"A cartridge of {name}", use, name, "safetensors")


def _file(
    path: Path, place: str | os.PathLike[str], revision: str | None, token: str | None
) -> tuple[Path, dict[str, str]]:
    if path.is_file():
        return path, {}
    folder, origin = local_folder(place, (TENSORS, "*.pt"), revision, token)
    for name in (TENSORS, CHECKPOINT, "cache_last.pt"):
        if (folder / name).is_file():
            return folder / name, origin
    found = sorted(folder.glob("*.pt"))
    if len(found) != 1:
        raise InvalidArgument(
            f"{place}: expected one .pt file, or {TENSORS}; found "
            f"{[file.name for file in found[:4]] or 'neither'}: name the file"
        )
    return found[0], origin
