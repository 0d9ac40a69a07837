"""recapturer: repeat the steps of a lineage that ran a model, from the tokens that it read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.memory import KVMemory, LineageNode, Source
from kvedit.memory.digest import digest_tensor
from kvedit.models.inspection import inspect
from kvedit.runtime.attaching import open_session
from kvedit.runtime.capturing import capture
from kvedit.runtime.text import cut_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["recapturer"]

_SEARCHED = 8192


def recapturer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source: Source,
    chunk: int | None = None,
) -> Callable[..., KVMemory]:
    """Returns a callable that repeats a capture or the growth of a session.

    It is called as ``again(node, *inputs)``, for :func:`kvedit.editors.replaying.replay`. A
    capture is repeated with the layers and window of its node, in the model's dtype. It has the
    same bits on one machine, versions and threads, if the tokens pass the model in the same pieces
    (``chunk``) and the capture was of one context: a batch pads, and may sum in another order.
    Growth is repeated in one piece, whereas a session was fed a prompt and then token by token: it
    comes close, and seldom to the bit.

    Args:
        model: the model that ran.
        tokenizer: its tokenizer; None where the step had none.
        source: the tokens that were read, of the step itself or of what grew out of it.
        chunk: tokens per forward pass; None takes what the node's environment says, or
            :func:`~kvedit.runtime.capturing.capture`'s default.

    Raises:
        InvalidArgument: from the callable, if the node is malformed or of another kind, or the
            source does not hold its tokens.
        IncompatibleModel: from the callable, if another model ran.
    """

    def again(node: LineageNode, *inputs: KVMemory) -> KVMemory:
        if node.operation == "capture" and node.version == 1 and not inputs:
            return _capture(model, tokenizer, source, node, chunk)
        if node.operation == "grow" and node.version == 1 and len(inputs) <= 1:
            return _grow(model, tokenizer, source, node, inputs[0] if inputs else None)
        raise InvalidArgument(
            f"expected a capture without inputs or a growth of one memory, version 1; found "
            f"{node.operation[:40]} version {node.version} of {len(inputs)} memories"
        )

    return again


def _capture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source: Source,
    node: LineageNode,
    chunk: int | None,
) -> KVMemory:
    given = _parameters(node, {"tokens", "model", "layers", "window"})
    live = inspect(model, tokenizer).spec.identity()["fingerprint"]
    if given["model"] != live:
        raise IncompatibleModel(
            f"the capture was made by {given['model']}, the model here is {live}: load that model "
            "and tokenizer, or take the stored memory"
        )
    read = _read(source, 0, given["tokens"], node)
    options: dict[str, Any] = {"layers": given["layers"], "window": given["window"]}
    pieces = chunk if chunk is not None else _noted_chunk(node)
    if pieces is not None:
        options["chunk"] = pieces
    memory: KVMemory = capture(model, tokenizer, read.tokens, **options)
    # Ids alone would lose messages, and text that no token spells.
    return replace(memory, source=read)


def _grow(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source: Source,
    node: LineageNode,
    base: KVMemory | None,
) -> KVMemory:
    given = _parameters(node, {"tokens"})
    known = base.tokens_count if base else 0
    read = _read(source, known, given["tokens"], node)
    found = inspect(model, tokenizer)
    with open_session(model, found, [base], tokenizer, strict=True) as session:
        session.forward(read.tokens[None, known:], keep=1)
        return replace(session.memory(), source=read)


def _parameters(node: LineageNode, names: set[str]) -> dict[str, Any]:
    found = json.loads(node.parameters)
    if not isinstance(found, dict) or set(found) != names:
        raise InvalidArgument(
            f"{node.operation[:40]}: expected the parameters {sorted(names)}, found "
            f"{node.parameters[:100]}"
        )
    return found


def _noted_chunk(node: LineageNode) -> int | None:
    noted = dict(node.environment).get("chunk")
    if noted is None:
        return None
    if not noted.isascii() or not noted.isdigit():
        raise InvalidArgument(f"chunk in a capture's environment: expected digits, found {noted!r}")
    return int(noted)


def _read(source: Source, start: int, digest: Any, node: LineageNode) -> Source:
    """Returns the source up to where the step had read it, found by its tokens' digest."""
    for stop in _ends(source, start):
        if digest_tensor(source.tokens[start:stop].cpu()) == digest:
            return cut_source(source, stop)
    raise InvalidArgument(
        f"the source of {len(source)} tokens does not hold those that step {node.id[:12]} "
        f"({node.operation[:40]}) read from token {start} on (digest {str(digest)[:12]}): pass the "
        "source of that step's own memory"
    )


def _ends(source: Source, start: int) -> Iterator[int]:
    yield len(source)
    if source.chat is not None and start < source.chat.cut < len(source):
        yield source.chat.cut
    # Every try hashes all tokens before it, so a long source is not searched.
    if len(source) <= _SEARCHED:
        yield from range(len(source) - 1, start, -1)
