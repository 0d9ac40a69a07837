"""Scheduling: the half of the connector that lives beside vLLM's scheduler.

It decides which memory a request gets, and makes sure that nothing else meets it: the request's
cache salt becomes the memory's digest, so vLLM's prefix cache keeps two memories, or a memory and
plain text, over the same tokens apart. What must not be answered is refused through the way by
which vLLM reports a transfer that failed, so that one request ends with an error and the engine
goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from kvedit.errors import InvalidArgument
from kvedit.serving.vllm.catalogue import Catalogue, Listed
from kvedit.serving.vllm.plans import Load, Plans

__all__ = ["Scheduling"]

_log = logging.getLogger("vllm.kvedit")  # a child of vLLM's logger, which writes it out


class Scheduling:
    """Keeps, for each live request, the memory that it gets or that it is refused.

    Args:
        catalogue: looks memories up.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._admitted: dict[str, Listed] = {}
        self._refused: set[str] = set()
        self._missing: dict[str, int] = {}  # slots that vLLM lacked when it asked last
        self._loads: list[Load] = []
        self._turned_away: list[str] = []

    def arrive(self, request: Any) -> None:
        """Takes a new request: finds its memory, and salts its prefix cache.

        Args:
            request: vLLM's; one without ``kv_transfer_params`` is left alone.
        """
        asked = request.kv_transfer_params
        if not asked:
            return
        name = str(request.request_id)
        try:
            found = self._find(asked, request)
        except Exception as error:  # whatever it is, the engine must go on
            _log.error("kvedit: request %s is refused: %s", name, error)
            self._refused.add(name)
            if not isinstance(asked, Mapping):
                request.kv_transfer_params = None  # vLLM looks into it as well, and would fall
            # Nothing that it might leave behind is ever found again.
            self._salt(request, f"refused:{uuid4().hex}")
            return
        self._admitted[name] = found
        self._salt(request, self.salt(found, request.cache_salt))

    def _find(self, asked: Any, request: Any) -> Listed:
        if not isinstance(asked, Mapping) or set(asked) != {"memory"}:
            raise InvalidArgument(
                "kv_transfer_params: expected {'memory': name, version or digest}, found "
                f"{asked!r}"
            )
        found = self._catalogue.find(asked["memory"])
        _check_request(request)
        _check_prompt(request.prompt_token_ids, found)
        return found

    def salt(self, found: Listed, old: str | None) -> str:
        """Returns what sets a memory's tokens apart: its digest, beside the client's own salt."""
        return f"kvedit:{found.memory}:{old or ''}"

    def _salt(self, request: Any, salt: str) -> None:
        request.cache_salt = salt
        request.block_hashes = []
        request.update_block_hashes()
        # Else the scheduler drops what the connector says, and computes the placeholders.
        request.skip_reading_prefix_cache = False

    def wanted(self, request: Any, computed: int) -> tuple[int, bool]:
        """Returns how many more tokens the connector brings, and whether they come later.

        Args:
            request: vLLM's.
            computed: tokens that are in the engine's own prefix cache.
        """
        name = str(request.request_id)
        if name in self._refused:
            return 1, True  # it waits for a transfer, which the worker reports as failed
        if (found := self._admitted.get(name)) is None:
            return 0, False
        self._missing[name] = max(0, found.slots - computed)
        return self._missing[name], False

    def allocated(self, request: Any, blocks: Sequence[int], brought: int) -> None:
        """Plans the transfer, now that the request has its pages.

        Args:
            request: vLLM's.
            blocks: all of its pages in order.
            brought: tokens that the connector said it brings.
        """
        name = str(request.request_id)
        if name in self._refused:
            if brought:
                self._turned_away.append(name)
        elif (found := self._admitted.get(name)) is not None:
            if brought:
                start = found.slots - brought
                self._loads.append(Load(found.memory, found.slots, start, tuple(blocks)))
            if brought != self._missing[name]:  # no receipt: the client's check must fail
                _log.error("kvedit: vLLM computes slots of request %s itself", name)
                self._missing.pop(name)

    def step(self) -> Plans:
        """Returns what was planned since the last step."""
        plans = Plans(tuple(self._loads), tuple(self._turned_away))
        self._loads, self._turned_away = [], []
        return plans

    def leave(self, request: Any) -> dict[str, Any] | None:
        """Forgets a request that ended, and returns its receipt if it had its memory."""
        name = str(request.request_id)
        self._refused.discard(name)
        found, served = self._admitted.pop(name, None), name in self._missing
        self._missing.pop(name, None)
        return {"memory": found.memory, "slots": found.slots} if found and served else None


def _check_request(request: Any) -> None:
    """Raises InvalidArgument if something of the request can't go with a memory."""
    sampling = request.sampling_params
    if sampling is None:
        raise InvalidArgument("a memory is for generation, not for pooling")
    if sampling.prompt_logprobs is not None or request.skip_reading_prefix_cache:
        raise InvalidArgument(
            "prompt_logprobs (or skip_reading_prefix_cache) makes vLLM compute the prompt again, "
            "placeholders included: ask without"
        )
    found = {
        "prompt embeddings": request.prompt_embeds is not None,
        "images or sounds": bool(request.mm_features),
        "a LoRA adapter": request.lora_request is not None,
        "streamed input": bool(request.resumable),
    }
    for what in (name for name, there in found.items() if there):
        raise InvalidArgument(f"{what} beside a memory: not supported")


def _check_prompt(ids: Sequence[int] | None, found: Listed) -> None:
    """Raises InvalidArgument unless the prompt has a placeholder for every slot, and goes on."""
    prompt = list(ids or ())
    if len(prompt) <= found.slots:
        raise InvalidArgument(
            f"the prompt has {len(prompt)} tokens: expected {found.slots} placeholders, one per "
            f"slot of memory {found.memory[:12]}, and one token more at least"
        )
    alike = next((i for i, token in enumerate(prompt) if token != prompt[0]), len(prompt))
    if alike != found.slots:
        raise InvalidArgument(
            f"memory {found.memory[:12]} has {found.slots} slots; the prompt begins with {alike} "
            "placeholders (equal token ids). Make it with kvedit.serving.request, or pass "
            "memory_slots to the chat template"
        )
