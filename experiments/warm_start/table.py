"""Tables of the warm-start experiment, from its journals alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from kvedit.evals.bootstrap import Mean, mean, paired_difference

COLUMNS = {"kl": "KL", "kl_gold": "KL, gold", "nll_gold": "NLL, gold", "agreement": "agreement",
           "f1": "F1", "contains": "contains"}  # fmt: skip
BASE = "first-p"

Unit = tuple[str, int]
"""A document and a seed."""


def journal_path(folder: Path, document: str, seed: int | None) -> Path:
    """Returns where results are: of a document and seed, or (None) of the full and no context."""
    return folder / "units" / f"{document}-{'frame' if seed is None else seed}.jsonl"


def tables(folder: Path, documents: Sequence[str], seeds: Sequence[int]) -> str:
    """Returns all tables, in Markdown."""
    units = {(d, s): _lines(journal_path(folder, d, s)) for d in documents for s in seeds}
    frame = {(d, 0): _lines(journal_path(folder, d, None)) for d in documents}
    rows = sorted({(r["start"], r["step"]) for u in units.values() for r in u.values()},
                  key=lambda row: (row[1], row[0]))  # fmt: skip
    parts = [_sizes(units), _means(frame, units, rows)]
    parts.append(_differences(units, [(a, (BASE, a[1])) for a in rows if a[0] != BASE],
                              f"Paired differences to {BASE} after as many steps"))  # fmt: skip
    last = max((step for name, step in rows if name == BASE), default=0)
    earlier = [(a, (BASE, last)) for a in rows if a[1] < last]
    parts.append(_differences(units, earlier, f"Paired differences to {BASE} after {last} steps"))
    parts.append(_documents(units, rows, documents))
    return "\n\n".join(parts)


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {line["key"]: line for line in lines if "key" in line}


def _name(row: tuple[str, int]) -> str:
    return f"{row[0]} @{row[1]}"


def _having(units: Mapping[Unit, Any], *rows: tuple[str, int]) -> list[Unit]:
    return [unit for unit, found in units.items() if all(_name(row) in found for row in rows)]


def _cases(
    units: Mapping[Unit, Any], chosen: Iterable[Unit], key: str, metric: str
) -> dict[str, float]:
    """Returns question to its mean over seeds: questions are the cases, seeds are not."""
    found: dict[str, list[float]] = {}
    for unit in chosen:
        for probe, scores in units[unit][key]["probes"].items():
            if metric in scores:
                found.setdefault(probe, []).append(scores[metric])
    return {probe: fmean(values) for probe, values in found.items()}


def _shown(found: Mean) -> str:
    if found.low is None:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sizes(units: Mapping[Unit, Any]) -> str:
    sizes = {
        document: (one["tokens"], one["slots"])
        for (document, _), found in units.items()
        for one in found.values()
        if one["start"] == BASE
    }
    return "\n".join(f"{name}: {t} tokens, {s} slots" for name, (t, s) in sizes.items())


def _means(
    frame: Mapping[Unit, Any], units: Mapping[Unit, Any], rows: Sequence[tuple[str, int]]
) -> str:
    lines = []
    for name in ("full", "nothing"):
        there = [unit for unit in frame if name in frame[unit]]
        if there:
            lines.append([name, str(len(there)), *_columns(frame, there, name), ""])
    for row in rows:
        there = _having(units, row)
        times = [units[unit][_name(row)]["cpu"] for unit in there]
        known = [time for time in times if time is not None]
        cpu = f"{fmean(known):.0f}" if known else ""
        lines.append([_name(row), str(len(there)), *_columns(units, there, _name(row)), cpu])
    return _table(["start @steps", "runs", *COLUMNS.values(), "CPU s"], lines)


def _columns(units: Mapping[Unit, Any], there: Sequence[Unit], key: str) -> list[str]:
    return [_shown(mean(list(_cases(units, there, key, metric).values()))) for metric in COLUMNS]


def _differences(
    units: Mapping[Unit, Any],
    pairs: Sequence[tuple[tuple[str, int], tuple[str, int]]],
    title: str,
) -> str:
    lines = []
    for row, base in pairs:
        both = _having(units, row, base)
        if not both:
            continue
        line = [_name(row), str(len(both))]
        for metric in ("kl", "nll_gold", "f1"):
            found = paired_difference(
                _cases(units, both, _name(row), metric), _cases(units, both, _name(base), metric)
            )
            line.append(_shown(found))
        lines.append(line)
    return f"{title}\n\n" + _table(["start @steps", "runs", "KL", "NLL, gold", "F1"], lines)


def _documents(
    units: Mapping[Unit, Any], rows: Sequence[tuple[str, int]], documents: Sequence[str]
) -> str:
    lines = []
    for row in rows:
        line = [_name(row)]
        for document in documents:
            there = [unit for unit in _having(units, row) if unit[0] == document]
            each = [fmean(_cases(units, [u], _name(row), "kl").values()) for u in there]
            line.append(", ".join(f"{value:.3f}" for value in each))
        lines.append(line)
    return "KL by document, one figure per seed\n\n" + _table(["start @steps", *documents], lines)
