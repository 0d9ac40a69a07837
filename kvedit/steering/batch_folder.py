"""A folder of read batches, so that a reading can be killed and go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.memory.files import write_atomically

__all__ = ["BatchFolder"]

_FORMAT = "kvedit-reading/1"
Tensors = dict[str, torch.Tensor]


class BatchFolder:
    """One safetensors file per finished batch, and a journal that names each with its digest.

    The journal's first line says what is read; a folder of something else is refused. A batch
    counts as done once its line is written, after its file. A line that is cut short, and a file
    that does not have its digest, are as if they were not there.

    Args:
        folder: the folder; it is made. None keeps nothing.
        facts: what the tensors depend on, as plain data.

    Raises:
        InvalidArgument: if the folder holds the reading of something else.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, facts: Mapping[str, Any]) -> None:
        """Opens the folder and reads its journal."""
        self._folder = None if folder is None else Path(folder)
        self._digests: dict[int, str] = {}
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal = self._folder / "journal.jsonl"
        header = json.loads(canonical_json({"format": _FORMAT, **facts}))
        lines = self._whole_lines()
        if not lines:
            write_atomically(self._journal, canonical_json(header) + b"\n", sync=True)
        elif lines[0] != header:
            differing = sorted(
                key for key in {*lines[0], *header} if lines[0].get(key) != header.get(key)
            )
            raise InvalidArgument(
                f"{self._folder} holds the reading of something else ({', '.join(differing)} "
                "differ): choose another folder, or remove it"
            )
        self._digests = {int(line["batch"]): str(line["digest"]) for line in lines[1:]}

    def _whole_lines(self) -> list[dict[str, Any]]:
        if not self._journal.exists():
            return []
        data = self._journal.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self._journal.open("r+b") as file:
                file.truncate(len(whole))
        try:
            return [dict(json.loads(line)) for line in whole.splitlines() if line.strip()]
        except (ValueError, TypeError) as error:
            raise InvalidArgument(f"{self._journal} is no journal of ours: {error}") from error

    def get(self, batch: int) -> Tensors | None:
        """Returns a batch that was finished before, or None."""
        if self._folder is None or batch not in self._digests:
            return None
        from safetensors.torch import load

        file = self._file(batch)
        data = file.read_bytes() if file.is_file() else b""
        return load(data) if digest_bytes(data) == self._digests[batch] else None

    def put(self, batch: int, tensors: Tensors) -> None:
        """Keeps a finished batch: its file first, then its line."""
        if self._folder is None:
            return
        from safetensors.torch import save

        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_atomically(self._file(batch), data, sync=True)
        self._digests[batch] = digest_bytes(data)
        line = {"batch": batch, "digest": self._digests[batch]}
        with self._journal.open("ab") as journal:
            journal.write(canonical_json(line) + b"\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _file(self, batch: int) -> Path:
        return (self._folder or Path()) / f"batch-{batch:05d}.safetensors"
