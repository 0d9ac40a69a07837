"""Extraction: the ``extract`` section of a config, and what an extraction found."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.memory import Delta
from kvedit.memory.delta import SITES
from kvedit.runs.steps import Loaded
from kvedit.runs.targets import fill
from kvedit.steering.contexts import plain_read
from kvedit.steering.contrast import Contrast
from kvedit.steering.estimators import Estimator
from kvedit.steering.extracting import delta_of
from kvedit.steering.reading import read_contrast
from kvedit.steering.report import ExtractionReport, extraction_report, prune_heads

__all__ = ["COLUMNS", "Extracted", "Extraction", "read_extraction"]

COLUMNS = ("site", "layer", "norm", "best head", "explained", "accuracy", "ordered")
"""Columns of :meth:`Extracted.rows`."""

_FOLDS = 4


@dataclass(frozen=True)
class Extraction:
    """How a delta is found, checked before a model is there.

    Args:
        sites: names of :data:`~kvedit.memory.delta.SITES`; a text is one.
        layers: layers, negative from the end; None is all.
        read: which tokens are read: last, mean, a number below 0, or a text or query.
        estimator: a name, or a mapping of name and options.
        batch: rows that are read at once.
        folder: keeps what was read, so that the same extraction goes on where it was stopped.
        seed: of the held-out folds of the report.
        prune: KV heads that are kept, those with the longest values: a number, or a share; None
            keeps all.
        ref: a stored delta that is taken in place of an extraction.

    Raises:
        InvalidArgument: if a value can't be used.
        UnknownName: if a site or estimator does not exist.
    """

    sites: Any = ("keys", "values")
    layers: Any = None
    read: Any = "last"
    estimator: Any = "mean"
    batch: int = 8
    folder: str | None = None
    seed: int = 0
    prune: int | float | None = None
    ref: str | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without a model."""
        named = (self.sites,) if isinstance(self.sites, str) else tuple(self.sites or ())
        for site in named:
            if site not in SITES:
                raise UnknownName("site of a delta", str(site), SITES)
        object.__setattr__(self, "sites", tuple(site for site in SITES if site in named))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(map(_layer, self.layers)))
        plain_read(self.read)
        Estimator.of(self.estimator)
        if not self.sites or self.batch < 1:
            raise InvalidArgument(
                f"extract: expected sites ({', '.join(SITES)}) and a batch of 1 or more, found "
                f"{list(named)} and {self.batch}"
            )
        if self.prune is not None and "values" not in self.sites:
            raise InvalidArgument(
                "extract.prune keeps the KV heads with the longest values, and values are not "
                f"among the sites ({', '.join(self.sites)})"
            )

    def run(
        self,
        loaded: Loaded,
        contrast: Contrast,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> Extracted:
        """Returns the delta of a contrast set, with a report on held-out pairs.

        Args:
            loaded: the model.
            contrast: the pairs.
            folder: where readings are kept if the section names none.
            progress: whether to show a bar.
        """
        readings = read_contrast(
            loaded.model, loaded.tokenizer, contrast, sites=self.sites, layers=self.layers,
            read=self.read, batch=self.batch, folder=self.folder or folder, progress=progress,
        )  # fmt: skip
        delta = delta_of(readings, self.estimator, seed=self.seed)
        if self.prune is not None:
            delta = prune_heads(delta, self.prune)
        report = None
        if len(contrast) > 1:
            folds = min(_FOLDS, len(contrast))
            report = extraction_report(readings, self.estimator, folds=folds, seed=self.seed)
        return Extracted(delta, report, contrast)


def read_extraction(section: Any) -> Extraction:
    """Returns a checked ``extract`` section."""
    return fill("extract", Extraction, section)


@dataclass(frozen=True, eq=False)
class Extracted:
    """A delta, and how well it tells held-out pairs apart.

    Args:
        delta: the delta.
        report: findings per vector; None for a single pair, or a stored delta.
        contrast: the pairs; None for a stored delta.
    """

    delta: Delta
    report: ExtractionReport | None
    contrast: Contrast | None

    def rows(self) -> list[tuple[str, ...]]:
        """Returns a row per site and layer: its norm, and the shares of its best head."""
        rows = []
        for site, norms in self.delta.norms().items():
            best = {} if self.report is None else self.report.by_layer(site)
            for layer, norm in norms.items():
                cells: tuple[str, ...] = ("", "", "", "")
                if layer in best:
                    one = best[layer]
                    shares = (f"{v:.2f}" for v in (one.explained, one.accuracy, one.ordered))
                    cells = ("" if one.head is None else str(one.head), *shares)
                rows.append((site, str(layer), f"{norm:.3g}", *cells))
        return rows

    def longest(self, count: int) -> list[tuple[str, ...]]:
        """Returns the rows of each site's longest vectors."""
        rows: dict[str, list[tuple[str, ...]]] = {}
        for row in self.rows():
            rows.setdefault(row[0], []).append(row)
        return [
            row
            for each in rows.values()
            for row in sorted(each, key=lambda row: float(row[2]), reverse=True)[:count]
        ]

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: what it is, and the findings of every vector."""
        findings = [] if self.report is None else self.report.rows()
        return {**self.facts(), "findings": findings}

    def facts(self) -> dict[str, Any]:
        """Returns what the delta is, in a few plain values."""
        made_of = self.contrast
        return {
            "digest": self.delta.digest,
            "sites": list(self.delta.sites),
            "layers": list(self.delta.layers),
            "contrast": None if made_of is None else made_of.digest,
            "pairs": None if made_of is None else len(made_of),
            "facts": dict(self.delta.facts),
        }

    def measures(self) -> dict[str, float]:
        """Returns norms by site, over all layers and heads: metrics beside it in a store."""
        return {
            f"norm/{site}": sum(norm**2 for norm in norms.values()) ** 0.5
            for site, norms in self.delta.norms().items()
        }


def _layer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"layers: expected whole numbers, found {value!r}")
    return value
