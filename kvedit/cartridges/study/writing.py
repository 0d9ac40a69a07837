"""Writer: the one process that adds to a folder of samples."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvedit.cartridges.sample import Sample
from kvedit.cartridges.study.rows import Row, pyarrow
from kvedit.cartridges.study.sample_set import SampleSet
from kvedit.cartridges.study.shards import (
    MANIFEST,
    TEMPORARY,
    Shards,
    manifest_of,
    publish,
    write_shard,
)
from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.memory.digest import canonical_json

__all__ = ["differences", "merge", "open_shards", "save_samples"]

_LOCK = ".lock"
_PER_SHARD = 512


@contextmanager
def open_shards(folder: str | Path, facts: Mapping[str, Any], k: int) -> Iterator[Shards]:
    """Opens a folder to add to it; it is made if it is not there.

    Args:
        folder: the folder: absent, empty, or a set of samples of the same facts.
        facts: what samples depend on, as plain data.
        k: width of the teacher's columns.

    Yields:
        Its shards.

    Raises:
        IncompatibleModel: if the folder's samples depend on other facts; they are named.
        InvalidArgument: if it holds something else, or another process writes there.
    """
    pyarrow()
    folder = Path(folder)
    manifest = manifest_of(facts, k)
    if folder.exists() and not folder.is_dir():
        raise InvalidArgument(f"{folder} is a file: expected a folder for samples")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InvalidArgument(f"another process adds samples to {folder}: wait for it") from None
    try:
        for left in folder.glob(f"{TEMPORARY}*"):  # of a process that was killed
            left.unlink()
        if not (folder / MANIFEST).exists():
            _refuse_foreign(folder)
            publish(folder / MANIFEST, canonical_json(manifest))
        shards = Shards(folder)
        differing = differences(shards.manifest, manifest)
        if differing:
            raise IncompatibleModel(
                f"{folder} holds samples of something else: {'; '.join(differing)}. Choose another "
                "folder, or remove this one"
            )
        yield shards
    finally:
        lock.release()


def _refuse_foreign(folder: Path) -> None:
    there = [path.name for path in folder.iterdir() if path.name != _LOCK]
    if there:
        raise InvalidArgument(
            f"{folder} is no set of samples and not empty ({', '.join(sorted(there)[:3])}): "
            "choose another folder"
        )


def differences(there: Any, asked: Any, name: str = "") -> list[str]:
    """Returns what differs between two pieces of plain data, by name, with both values."""
    if isinstance(there, dict) and isinstance(asked, dict):
        found: list[str] = []
        for key in sorted({*there, *asked}):
            below = f"{name}.{key}" if name and name != "facts" else str(key)
            found += differences(there.get(key), asked.get(key), below)
        return found
    if there == asked:
        return []
    return [f"{name}: found {_short(there)}, asked for {_short(asked)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def save_samples(
    folder: str | Path, samples: Iterable[Sample], facts: Mapping[str, Any]
) -> SampleSet:
    """Returns a set that it writes into a new folder; equal keys are one sample.

    Args:
        folder: absent or empty.
        samples: at least one; their teacher's columns have one width.
        facts: what they depend on, as plain data, for example
            ``{"model": memory.model.identity()["fingerprint"]}``.

    Raises:
        InvalidArgument: if there is no sample, widths differ, or the folder holds samples.
    """
    rows = {sample.key: Row(sample, "", number) for number, sample in enumerate(samples)}
    return _save(folder, list(rows.values()), {"made": "saved", **facts})


def merge(sets: Iterable[SampleSet], folder: str | Path) -> SampleSet:
    """Returns one set of all samples of several, in order, that it writes into a new folder.

    Equal keys are one sample. The merged set can be read and merged again, and not resumed.

    Args:
        sets: sets of one model, tokenizer and width; of any corpora, settings and seeds.
        folder: absent or empty.

    Raises:
        IncompatibleModel: if models differ.
        InvalidArgument: if there is no set, widths differ, or the folder holds samples.
    """
    parts = list(sets)
    if not parts:
        raise InvalidArgument("expected at least one set of samples")
    first = parts[0].facts.get("model")
    for part in parts[1:]:
        differing = differences(first, part.facts.get("model"), "model")
        if differing:
            raise IncompatibleModel(
                f"{part.folder} and {parts[0].folder} can't be merged: {'; '.join(differing)}"
            )
    rows: dict[str, Row] = {}
    for part in parts:
        for index in range(len(part)):
            row = part.row(index)
            rows.setdefault(row.sample.key, Row(row.sample, row.chunk, len(rows)))
    facts = {"made": "merged", "model": first, "parts": [part.digest for part in parts]}
    return _save(folder, list(rows.values()), facts)


def _save(folder: str | Path, rows: list[Row], facts: Mapping[str, Any]) -> SampleSet:
    widths = {row.sample.top_ids.shape[1] for row in rows}
    if len(widths) != 1:
        raise InvalidArgument(
            f"expected samples whose teacher's columns have one width, found {sorted(widths)}"
        )
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidArgument(f"{folder} is not empty: choose another folder")
    # Beside its place first: a folder of that name holds all samples or is not there.
    making = folder.parent / f"{TEMPORARY}{folder.name}-{secrets.token_hex(8)}"
    try:
        with open_shards(making, facts, widths.pop()) as shards:
            for start in range(0, len(rows), _PER_SHARD):
                part = rows[start : start + _PER_SHARD]
                write_shard(shards, start + len(part), part, {})
        if folder.exists():
            folder.rmdir()
        making.rename(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return SampleSet(folder)
