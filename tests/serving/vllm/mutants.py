"""A connector that does one thing wrong, chosen by a file while the engine runs. For tests only."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from kvedit.serving.vllm import connector
from kvedit.serving.vllm.catalogue import Catalogue, Listed
from kvedit.serving.vllm.loading import Loaded
from kvedit.serving.vllm.plans import Load
from kvedit.serving.vllm.scheduling import Scheduling
from kvedit.serving.vllm.writing import write

FILE = "KVEDIT_TEST_MUTANT"
MODES = ("nothing", "flipped", "reversed", "short", "naive")


def mode() -> str:
    return Path(os.environ[FILE]).read_text()


class Unsalted(Scheduling):
    def salt(self, found: Listed, old: str | None) -> str:
        if mode() == "unsalted":
            return old or ""
        return f"{mode()}{super().salt(found, old)}"  # no mutant is answered from another's pages


class MemoryConnector(connector.MemoryConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.scheduling = Unsalted(Catalogue(self.store, self.model))

    def _load(self, load: Load, layers: Any) -> None:
        wrong = mode()
        memory = self.loader.load(load.memory)
        places, order = load.places(self._page), list(self._order)
        start, slots = load.start, load.slots
        if wrong == "nothing":
            return
        if wrong == "flipped":
            memory = _mapped(memory, lambda tensor: tensor.flip(1))
        if wrong == "reversed":
            order = order[::-1]
        if wrong == "short":
            slots -= 1
            memory = _mapped(memory, lambda tensor: tensor[:slots])
            places = places[: slots - start]
        if wrong == "naive":
            self._write_naively(layers, memory, start, places)
            return
        write(layers, order, memory, start, places)

    def _write_naively(self, layers: Any, memory: Loaded, start: int, places: torch.Tensor) -> None:
        """As the shape of the pages suggests: keys, then values, for each token."""
        pages, offsets = places // self._page, places % self._page
        parts = zip(self._order, memory.keys, memory.values, strict=True)
        for name, key, value in parts:
            both = torch.cat((key[start:], value[start:]), dim=-1)  # [slot, head, dim]
            layers[name].kv_cache[pages, :, offsets] = both


def _mapped(memory: Loaded, change: Any) -> Loaded:
    parts = {name: tuple(map(change, getattr(memory, name))) for name in ("keys", "values")}
    return dataclasses.replace(memory, **parts)
