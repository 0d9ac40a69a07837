"""kv.attach: put memories in front of a model for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.models.inspection import Inspection, inspect
from kvedit.runtime.gate import admit
from kvedit.runtime.hooks import announcing
from kvedit.runtime.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["attach", "open_session"]


@contextmanager
def open_session(
    model: PreTrainedModel,
    inspection: Inspection,
    memories: Sequence[KVMemory | None],
    tokenizer: PreTrainedTokenizerBase | None,
    strict: bool,
) -> Iterator[Session]:
    """Opens a session on an inspected model; :func:`attach` is the public way."""
    limit = inspection.spec.max_position if strict else None
    for memory in memories:
        if memory is not None:
            admit(memory, inspection.spec, model.dtype, strict)
    session = Session(model, inspection, memories, tokenizer, limit)
    with announcing(model, session.cache):
        yield session


@contextmanager
def attach(
    model: PreTrainedModel,
    memory: KVMemory | Sequence[KVMemory],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    rows: int = 1,
    strict: bool = True,
) -> Iterator[Session]:
    """Attaches memories to a model for the time of the block.

    Several sessions can be open on one model, and one memory in several sessions. In the block,
    raw calls work with ``cache=session.cache`` (``past_key_values=`` before transformers 5.24) and
    explicit ``position_ids``.

    Args:
        model: the model that made the memories.
        memory: one memory, or a list: one per row of a batch.
        tokenizer: for text prompts.
        rows: rows that continue one memory; ignored for a list.
        strict: whether the compatibility gate and the model's position limit hold.

    Yields:
        The session.

    Raises:
        IncompatibleModel: if a memory does not fit the model.
        UnsupportedModel: if the model has a mechanism that is not understood.
        InvalidArgument: if there is no memory or no row.
    """
    memories = [memory] * rows if isinstance(memory, KVMemory) else list(memory)
    if not memories:
        raise InvalidArgument("expected at least one memory and one row")
    with open_session(model, inspect(model, tokenizer), memories, tokenizer, strict) as session:
        yield session
