"""kv.load: a model and its tokenizer, from the package, a folder, the hub, or an object."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.models.fingerprint import mark_source, weight_files
from kvedit.models.packaged import PACKAGED, packaged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TINY", "as_dtype", "load"]

TINY = "tiny:"
"""``tiny:llama`` and so on name random toys of a few layers, to try things out in a second."""


def load(
    name: str | Path | PreTrainedModel,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn: str | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a causal language model in eval mode and its tokenizer.

    Args:
        name: ``"smollm2-135m"`` (packaged, offline), a folder, a hub id, or a loaded model, which
            is passed through; ``"tiny:llama"`` and so on build random toys.
        dtype: compute dtype, for example ``torch.bfloat16`` or ``"bfloat16"``; None keeps the
            checkpoint's.
        device: where to put it; None leaves it on the CPU, or a passed model where it is.
        attn: attention implementation (``"sdpa"``, ``"eager"``, ``"flex_attention"``, …).
        revision: branch, tag or commit of a hub id.

    Raises:
        InvalidArgument: if nothing of that name can be loaded.
    """
    if not isinstance(name, str | Path):
        return _passed_through(name, dtype, device, attn)
    if str(name).startswith(TINY):
        return _toy(str(name), dtype, device, attn)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = packaged_folder() if str(name) == PACKAGED else name
    options: dict[str, Any] = {"revision": revision} if revision else {}
    wanted = {"dtype": as_dtype(dtype) or "auto", "attn_implementation": attn}
    settings = {key: value for key, value in wanted.items() if value is not None}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model = AutoModelForCausalLM.from_pretrained(place, **settings, **options)
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            f"can't load {str(name)!r}: expected {PACKAGED!r}, a folder with config.json and "
            f"weights, or a hub id. transformers says: {error}"
        ) from error
    if str(name) == PACKAGED:
        model.config._name_or_path = model.name_or_path = PACKAGED
    model = model.to(device).eval() if device is not None else model.eval()
    mark_source(model, weight_files(_folder(place, revision)))
    return model, tokenizer


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns a torch dtype from its name (``"bfloat16"``, ``"torch.bfloat16"``) or itself.

    Raises:
        InvalidArgument: if there is no such floating dtype.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidArgument(f"dtype {dtype!r}: expected for example float32, bfloat16, float16")
    return found


def _toy(
    name: str,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    attn: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from kvedit.models.tiny import tiny_model

    chosen = as_dtype(dtype) or torch.float32
    model, tokenizer = tiny_model(name.removeprefix(TINY), dtype=chosen, attn=attn)
    # The name goes into memories, so that the model is found again by it.
    model.config._name_or_path = model.name_or_path = name
    return (model if device is None else model.to(device)), tokenizer


def _passed_through(
    model: PreTrainedModel,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    attn: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    if not hasattr(model, "config"):
        raise InvalidArgument(
            f"expected a name, a folder or a transformers model, found {type(model)}"
        )
    if dtype is not None or device is not None:
        model = model.to(device=device, dtype=as_dtype(dtype))
    if attn is not None:
        model.set_attn_implementation(attn)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            f"no tokenizer is known for this model ({model.name_or_path!r}); use the model and "
            "your own tokenizer directly, load() adds nothing to them"
        ) from error
    return model.eval(), tokenizer


def _folder(place: str | Path, revision: str | None) -> Path:
    if Path(place).is_dir():
        return Path(place)
    from transformers.utils import cached_file

    config = cached_file(str(place), "config.json", revision=revision, local_files_only=True)
    return Path(str(config)).parent
