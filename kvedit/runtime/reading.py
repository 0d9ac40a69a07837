"""ModelReader: the runtime as editors may use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvedit.axes import expect_axes
from kvedit.errors import IncompatibleModel, InvalidArgument, UnknownName
from kvedit.memory import KVMemory, Source
from kvedit.models.inspection import Inspection, inspect
from kvedit.runtime.attaching import open_session
from kvedit.runtime.capturing import piece_size
from kvedit.runtime.grown import row_layers
from kvedit.runtime.oneshot import generate
from kvedit.runtime.session import Session
from kvedit.runtime.streams import STREAMS, attention_streams
from kvedit.runtime.tapping import SITES, tap
from kvedit.runtime.text import encode_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ModelReader"]

_PIECE = 1024
"""Tokens of a context that are read at once under bias, whose mask grows with their square."""


@dataclass(frozen=True, eq=False)
class ModelReader:
    """Runs tokens over memories of one model and hands back what was asked for.

    Args:
        model: the model that made the memories.
        tokenizer: its tokenizer; needed by editors that bring texts or questions of their own.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None

    def read(
        self,
        memory: KVMemory | None,
        tokens: torch.Tensor,
        sites: Iterable[str],
        replace: Mapping[str, Callable[[int, torch.Tensor], torch.Tensor]] | None = None,
    ) -> dict[str, dict[int, torch.Tensor]]:
        """Returns the tensors, by site and layer, of one pass of ``tokens`` over ``memory``.

        Args:
            memory: the memory; it does not change. None reads the tokens from nothing.
            tokens: ``[query]`` token ids.
            sites: names of :data:`~kvedit.runtime.tapping.SITES` and of
                :data:`~kvedit.runtime.streams.STREAMS`.
            replace: what attention reads instead, as :func:`~kvedit.runtime.tapping.tap` takes it.

        Raises:
            UnknownName: if a site does not exist.
        """
        names = list(sites)
        for name in names:
            if name not in SITES and name not in STREAMS:
                raise UnknownName("site", name, (*SITES, *STREAMS))
        tapped = [name for name in names if name in SITES]
        found = inspect(self.model, self.tokenizer)
        with ExitStack() as stack:
            opened = open_session(self.model, found, [memory], None, strict=True)
            session = stack.enter_context(opened)
            taps = tapped or replace
            tapping = tap(self.model, tapped, replace=replace)
            seen = stack.enter_context(tapping) if taps else None
            streams = stack.enter_context(attention_streams(found)) if tapped != names else {}
            session.forward(tokens[None], keep=1)

        def layers(name: str) -> dict[int, torch.Tensor]:
            if name in STREAMS:
                return {layer: pair[STREAMS[name]] for layer, pair in streams.items()}
            return {layer: seen[name, layer] for layer in seen.layers} if seen else {}

        return {name: layers(name) for name in names}

    def reread(
        self,
        memory: KVMemory,
        bias: Mapping[int, torch.Tensor],
        keys: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ) -> KVMemory:
        """Returns the memory as it is when its tokens read each other under bias or other keys.

        Every token sees the biased ones before it, and itself, with the bias added to the logit,
        and keys as ``keys`` makes them of what the layer computed in this very pass. The result
        holds no bias, no rules and no key that was put in: what was steered is in the values, and
        in keys that come of it.

        Args:
            memory: a captured memory: every layer holds one slot per token, at its position.
            bias: layer to float32 ``[query_head, token]``; layers that are left out have none.
            keys: layer to a function from keys after RoPE ``[kv_head, token, dim]``, of the tokens
                so far, to those that attention reads in their place. It is called with growing
                numbers of tokens, and must treat each by itself.

        Raises:
            InvalidArgument: if slots were dropped, moved or made by no token.
            IncompatibleModel: if another model made the memory.
        """
        source = _natural_source(memory)
        found = inspect(self.model, self.tokenizer)
        different = memory.model.fingerprint.differences(found.spec.fingerprint)
        if different:
            raise IncompatibleModel(
                f"this memory of {memory.model.name} was made by another model than "
                f"{found.spec.name}: {', '.join(different)} differ; it can only be read anew by "
                "the model that made it"
            )
        with ExitStack() as stack:
            opened = open_session(self.model, found, [None], None, strict=True)
            session = stack.enter_context(opened)
            _bias_coming(session, found, bias, len(source))
            if keys:
                swap = {"keys": lambda layer, states: keys[layer](states[0])[None]}
                # A tap shows attention other keys; the cache keeps those that the layer computed.
                stack.enter_context(tap(self.model, layers=list(keys), replace=swap))
            session.cache.reserve(len(source))
            size = piece_size(found, len(source), _PIECE)
            for start in range(0, len(source), size):
                session.forward(source.tokens[None, start : start + size], keep=1)
            layers = row_layers(session, 0, source, final=True)
        kept = {index: replace(layer, bias=None) for index, layer in layers.items()}
        return replace(memory, layers={index: kept[index] for index in memory.layers}, rules=())

    def grow(self, memory: KVMemory, tokens: torch.Tensor) -> KVMemory:
        """Returns the memory after ``tokens`` ``[n]`` were read behind it, as a session's is."""
        found = inspect(self.model, self.tokenizer)
        with open_session(self.model, found, [memory], self.tokenizer, strict=True) as session:
            session.forward(tokens[None], keep=1)
            return session.memory()

    def encode(self, text: str) -> torch.Tensor:
        """Returns the token ids ``[n]`` of a text, without special tokens.

        Raises:
            InvalidArgument: without a tokenizer.
        """
        if self.tokenizer is None:
            raise InvalidArgument("this editor brings a text: make ModelReader(model, tokenizer)")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def turn(self, memory: KVMemory, prompt: str) -> torch.Tensor:
        """Returns the token ids ``[n]`` by which a prompt goes on behind a memory.

        It is the next user turn of a chat, and else the text itself.

        Raises:
            InvalidArgument: without a tokenizer.
            TemplateNotCuttable: if the chat template can't go on behind this memory.
        """
        if self.tokenizer is None:
            raise InvalidArgument("this editor brings a text: make ModelReader(model, tokenizer)")
        return encode_turn(self.tokenizer, memory.source, prompt).tokens[memory.tokens_count :]

    def ask(self, memory: KVMemory, prompt: str, max_new_tokens: int) -> str:
        """Returns the greedy answer to a prompt over a memory."""
        if self.tokenizer is None:
            raise InvalidArgument("this editor asks a question: make ModelReader(model, tokenizer)")
        reply: str = generate(
            self.model, self.tokenizer, memory, prompt, max_new_tokens=max_new_tokens,
            do_sample=False,
        )  # fmt: skip
        return reply


def _bias_coming(
    session: Session, found: Inspection, bias: Mapping[int, torch.Tensor], tokens: int
) -> None:
    for index, coming in bias.items():
        heads = found.spec.layers[index].query_heads
        expect_axes(
            f"layer {index} bias", coming, "query_head token", query_head=heads, token=tokens
        )
        session.cache.layers[index].coming = coming


def _natural_source(memory: KVMemory) -> Source:
    """Returns the source of a memory that holds one slot per token at its own position."""
    natural = torch.arange(memory.tokens_count)
    parts = [p.cpu() for layer in memory.layers.values() for p in (layer.source, layer.positions)]
    if memory.source is None or not all(torch.equal(part, natural) for part in parts):
        raise InvalidArgument(
            "some layer does not hold one slot per token at its own position: only a captured "
            "memory can be read anew"
        )
    return memory.source
