"""Rows: samples as columns of a parquet file, and back.

Log-probabilities are float32, as the teacher gave them. Half precision would save two of the eight
bytes that a kept token takes, and move probabilities by up to 0.4 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvedit.cartridges.sample import Sample
from kvedit.errors import MissingDependency
from kvedit.memory.digest import canonical_json, digest_bytes, digest_tensor

__all__ = ["Row", "pyarrow", "row_digest", "sample_of", "schema", "table_of"]


@dataclass(frozen=True, eq=False)
class Row:
    """A sample, and where it came from.

    Args:
        sample: the sample.
        chunk: the characters of its document that were read, ``start:stop``; empty for all.
        attempt: number of the attempt that made it.
    """

    sample: Sample
    chunk: str
    attempt: int


def pyarrow() -> Any:
    """Returns pyarrow with its parquet module.

    Raises:
        MissingDependency: if it is not installed.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency("pyarrow", "study", "a set of self-study samples") from error
    return arrow


def schema() -> Any:
    """Returns the columns of a shard.

    ``kept`` counts the teacher's tokens at every answer token; ``top_ids`` and ``top_logprobs``
    hold them one behind the other, without padding.
    """
    arrow = pyarrow()
    text, whole = arrow.string(), arrow.int32()
    return arrow.schema(
        [
            ("key", text),
            ("document", text),
            ("chunk", text),
            ("attempt", arrow.int64()),
            ("kind", text),
            ("question", text),
            ("answer", text),
            ("token_ids", arrow.list_(whole)),
            ("start", whole),
            ("kept", arrow.list_(whole)),
            ("top_ids", arrow.list_(whole)),
            ("top_logprobs", arrow.list_(arrow.float32())),
            ("tail", arrow.list_(arrow.float32())),
        ]
    )


def table_of(rows: Sequence[Row]) -> Any:
    """Returns rows as a table."""
    columns: dict[str, list[Any]] = {name: [] for name in schema().names}
    for row in rows:
        for name, value in _cells(row).items():
            columns[name].append(value)
    return pyarrow().table(columns, schema=schema())


def _cells(row: Row) -> dict[str, Any]:
    sample = row.sample
    there = sample.top_logprobs.isfinite()
    return {
        "key": sample.key,
        "document": sample.document,
        "chunk": row.chunk,
        "attempt": row.attempt,
        "kind": sample.kind,
        "question": sample.question,
        "answer": sample.answer,
        "token_ids": sample.tokens.to(torch.int32).numpy(),
        "start": sample.start,
        "kept": there.sum(dim=1).to(torch.int32).numpy(),
        "top_ids": sample.top_ids[there].to(torch.int32).numpy(),
        "top_logprobs": sample.top_logprobs[there].float().numpy(),
        "tail": sample.tail.float().numpy(),
    }


def sample_of(table: Any, index: int, k: int) -> Sample:
    """Returns one row of a table as a sample.

    Args:
        table: the table.
        index: number of the row.
        k: width of the teacher's columns; rows that hold fewer tokens are padded.
    """

    def cell(name: str) -> Any:
        return table.column(name)[index]

    kept = _tensor(cell("kept"), torch.int64)
    there = torch.arange(k) < kept[:, None]
    ids = torch.zeros(len(kept), k, dtype=torch.int64)
    logprobs = torch.full((len(kept), k), -torch.inf)
    ids[there] = _tensor(cell("top_ids"), torch.int64)
    logprobs[there] = _tensor(cell("top_logprobs"), torch.float32)
    return Sample(
        key=cell("key").as_py(),
        document=cell("document").as_py(),
        kind=cell("kind").as_py(),
        question=cell("question").as_py(),
        answer=cell("answer").as_py(),
        tokens=_tensor(cell("token_ids"), torch.int64),
        start=cell("start").as_py(),
        top_ids=ids,
        top_logprobs=logprobs,
        tail=_tensor(cell("tail"), torch.float32),
    )


def _tensor(scalar: Any, dtype: torch.dtype) -> torch.Tensor:
    # A copy: arrow's own memory is read-only.
    return torch.tensor(scalar.values.to_numpy(zero_copy_only=False), dtype=dtype)


def row_digest(sample: Sample) -> str:
    """Returns the digest of all that a sample says."""
    texts = [sample.key, sample.document, sample.kind, sample.question, sample.answer, sample.start]
    tensors = (sample.tokens, sample.top_ids, sample.top_logprobs, sample.tail)
    return digest_bytes(canonical_json([*texts, *map(digest_tensor, tensors)]))
