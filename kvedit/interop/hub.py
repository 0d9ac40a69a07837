"""A folder for the hub: tensors, manifest and a card that warns of the text inside; and back."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import CorruptMemory, InvalidArgument, TierUnavailable
from kvedit.interop.card import PRIVACY, card
from kvedit.interop.document import document, tensors, to_memory, without_source
from kvedit.interop.exported import Exported
from kvedit.interop.fetching import local_folder
from kvedit.interop.files import new_folder
from kvedit.interop.plain import admitted
from kvedit.interop.tensors import read_tensors, write_tensors
from kvedit.memory import KVMemory, ModelSpec, Source
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.memory.show import human_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MANIFEST", "from_hub", "push_folder", "push_to_hub", "to_hub"]

MANIFEST, WEIGHTS, CARD = "memory.json", "memory.safetensors", "README.md"

_USE = """\
```python
import kvedit as kv
from kvedit.interop import from_hub

model, tokenizer = kv.load({model})
memory = from_hub("owner/name or this folder", model, tokenizer)
kv.generate(model, tokenizer, memory, "…", max_new_tokens=40)
```

| | |
|---|---|
| slots, most in a layer | {slots} |
| layers | {layers} |
| the first query stands at position | {next_position} |
| size | {size} |
| attention bias | {bias} |
| run-time rules | {rules} |
| source text | {source} |
| content digest | `{content}` |

How it was made, the newest step first. Parameters may quote the source text.

```
{lineage}
```
"""


def to_hub(
    memory: KVMemory,
    folder: str | os.PathLike[str],
    *,
    source: bool = False,
    licence: str = "",
    overwrite: bool = False,
) -> Exported:
    """Returns what it wrote: a memory as a folder for the hub, bit by bit.

    Args:
        memory: the memory; bias, rules and positions go along.
        folder: the folder to make.
        source: whether tokens and text go along. Without them spans can't be found and a chat
            can't go on as one; keys and values hold the text in any case.
        licence: of the text.
        overwrite: whether such a folder that is there already is replaced.

    Raises:
        InvalidArgument: if the folder exists.
        MutatedMemory: if the memory's tensors were changed in place.
    """
    kept = memory if source else without_source(memory)
    with new_folder(folder, overwrite, (MANIFEST, WEIGHTS, CARD)) as work:
        write_tensors(work / WEIGHTS, tensors(kept), {})
        facts = document(kept, licence)
        (work / MANIFEST).write_bytes(canonical_json(facts))
        (work / CARD).write_text(_card(kept, licence), encoding="utf-8")
    return Exported(Path(folder), "hub", memory.slots, 0, (PRIVACY,))


def from_hub(
    place: str | os.PathLike[str],
    model: PreTrainedModel | ModelSpec | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    source: Source | None = None,
    strict: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> KVMemory:
    """Returns the memory of a folder that :func:`to_hub` wrote, or of a repository on the hub.

    Args:
        place: the folder, or ``"owner/name"``.
        model: the model, or its facts; None leaves the check to attach.
        tokenizer: its tokenizer, for the fingerprint.
        dtype: of keys and values; None takes the model's, or the file's without one.
        source: the text that it stands for, where the folder does not hold it.
        strict: whether it must be of this very model; shapes always must fit.
        revision: branch, tag or commit of a repository.
        token: for a private repository.

    Raises:
        InvalidArgument: if it is no such folder.
        NotFound: if there is neither a folder nor a repository.
        IncompatibleModel: if it is of another model.
        CorruptMemory: if a file can't be read, or was changed.
    """
    folder, origin = local_folder(place, (MANIFEST, WEIGHTS), revision, token)
    path = folder / MANIFEST
    if not path.is_file():
        raise InvalidArgument(f"{place} holds no memory: it has no {MANIFEST}")
    data = path.read_bytes()
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptMemory(f"{path} is no JSON: {error}") from error
    if not isinstance(facts, dict):
        raise CorruptMemory(f"{path} is no manifest")
    read = read_tensors(folder / WEIGHTS)
    memory = to_memory(facts, read.tensors, str(folder))
    files = {MANIFEST: digest_bytes(data), WEIGHTS: read.digest}
    noted = {"licence": str(facts.get("licence", "")), **origin}
    return admitted(memory, model, tokenizer, dtype, source, strict, "hub", files, noted)


def push_to_hub(
    memory: KVMemory,
    repo_id: str,
    *,
    source: bool = False,
    licence: str = "",
    private: bool = True,
    revision: str | None = None,
    message: str = "",
    token: str | None = None,
) -> str:
    """Returns the address of the commit that put a memory on the hub.

    Args:
        memory: the memory.
        repo_id: ``"owner/name"``; made if it does not exist.
        source: whether tokens and text go along as such.
        licence: of the text.
        private: whether a new repository is private. Who may read it can read the source text.
        revision: branch to commit to.
        message: of the commit.
        token: of the user; None takes the one that is logged in.

    Raises:
        InvalidArgument: if the name can't be one.
        TierUnavailable: if the hub refuses, or can't be reached.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "memory")
        to_hub(memory, folder, source=source, licence=licence)
        return push_folder(folder, repo_id, private, revision, message, token)


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    private: bool = True,
    revision: str | None = None,
    message: str = "",
    token: str | None = None,
) -> str:
    """Returns the address of the commit that put an exported folder, of any format, on the hub.

    Args:
        folder: the folder.
        repo_id: ``"owner/name"``; made if it does not exist.
        private: whether a new repository is private.
        revision: branch to commit to.
        message: of the commit.
        token: of the user; None takes the one that is logged in.

    Raises:
        InvalidArgument: if the name can't be one.
        TierUnavailable: if the hub refuses, or can't be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = huggingface_hub.HfApi(token=token)
    said = message or "A KV memory, written by kvedit"
    try:
        hub.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        commit: Any = hub.upload_folder(
            folder_path=Path(folder), repo_id=repo_id, commit_message=said, revision=revision
        )
    except HFValidationError as error:
        raise InvalidArgument(f"{repo_id!r} can't be a repository: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TierUnavailable(f"the hub did not take {repo_id!r}: {reason}") from error
    return str(getattr(commit, "commit_url", commit))


def _card(memory: KVMemory, licence: str) -> str:
    spec = memory.model
    biased = sum(layer.bias is not None for layer in memory.layers.values())
    use = _USE.format(
        model=json.dumps(spec.name),
        slots=memory.slots,
        layers=len(memory.layers),
        next_position=memory.next_position,
        size=human_bytes(memory.nbytes),
        bias=f"in {biased} layers: only engines that carry it serve it" if biased else "none",
        rules=len(memory.rules) or "none",
        source="beside the tensors" if memory.source is not None else "not beside the tensors",
        content=memory.digest,
        lineage=memory.lineage.describe().replace("```", "'''") or "unknown",
    )
    return card(f"A KV memory of {spec.name}", use, spec.name, "kvedit", ("kvedit",), licence)
