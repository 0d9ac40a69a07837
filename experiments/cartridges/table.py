"""Tables of the studies, from their journals alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from studies import Study  # beside this file

from kvedit.evals.bootstrap import Mean, mean, paired_difference

COLUMNS = {"kl": "KL", "kl_gold": "KL, gold", "nll_gold": "NLL, gold", "agreement": "agreement",
           "generation_gap": "gap", "f1": "F1", "contains": "contains"}  # fmt: skip
DRAWS = 2000

Unit = tuple[str, int]
"""A document and a seed."""
Row = tuple[str, int]
"""A variant and a number of steps."""


def journal_path(folder: Path, document: str, seed: int | None, ratio: float = 8) -> Path:
    """Returns where results are: of a document, seed and size, or (None) of full and no context."""
    size = "" if ratio == 8 or seed is None else f"-{ratio:g}x"
    return folder / "units" / f"{document}{size}-{'frame' if seed is None else seed}.jsonl"


def tables(folder: Path, study: Study, documents: Sequence[str], seeds: Sequence[int]) -> str:
    """Returns all tables of a study, in Markdown."""
    frame = {(d, 0): _lines(journal_path(folder, d, None)) for d in documents}
    parts = [_means(frame, {}, [], study.base)]
    for ratio in study.ratios:
        units = {
            (d, s): _lines(journal_path(folder, d, s, ratio)) for d in documents for s in seeds
        }
        parts.append(f"**{ratio:g} times smaller** ({_sizes(units, study.base)})")
        rows = [(v.name, step) for step in study.steps for v in study.variants]
        rows = [row for row in rows if _having(units, row)]
        parts.append(_means({}, units, rows, study.base))
        parts.append(_differences(units, rows, study))
        parts.append(_documents(units, rows, documents))
    return "\n\n".join(part for part in parts if part)


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {line["key"]: line for line in lines if "key" in line}


def _name(row: Row) -> str:
    return f"{row[0]} @{row[1]}"


def _having(units: Mapping[Unit, Any], *rows: Row) -> list[Unit]:
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


def _sizes(units: Mapping[Unit, Any], base: str) -> str:
    sizes = {
        document: f"{document} {one['tokens']} to {one['slots']} slots"
        for (document, _), found in units.items()
        for one in found.values()
        if one["start"] == base
    }
    return ", ".join(sizes.values())


def _means(
    frame: Mapping[Unit, Any], units: Mapping[Unit, Any], rows: Sequence[Row], base: str
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
    return _table(["variant @steps", "runs", *COLUMNS.values(), "CPU s"], lines) if lines else ""


def _columns(units: Mapping[Unit, Any], there: Sequence[Unit], key: str) -> list[str]:
    return [_shown(mean(list(_cases(units, there, key, metric).values()))) for metric in COLUMNS]


def _differences(units: Mapping[Unit, Any], rows: Sequence[Row], study: Study) -> str:
    """Returns how rows differ from the base after as many steps, and after the most of all."""
    last = max(study.steps)
    lines = []
    for row in rows:
        for other in dict.fromkeys(((study.base, row[1]), (study.base, last))):
            both = _having(units, row, other)
            if row[0] == study.base or not both:
                continue
            line = [_name(row), _name(other), str(len(both))]
            for metric in ("kl", "kl_gold"):
                ours, theirs = (_cases(units, both, _name(r), metric) for r in (row, other))
                line += [_ratio(ours, theirs), _shown(paired_difference(ours, theirs))]
            lines.append(line)
    head = ["variant", "against", "runs", "KL, ratio", "difference", "gold KL, ratio", "difference"]
    return _table(head, lines) if lines else ""


def _ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    """Returns the ratio of the means, with the bootstrap's 95 % over questions."""
    keys = sorted(ours)
    random = np.random.default_rng(0)
    found = []
    one, two = (np.array([values[key] for key in keys]) for values in (ours, theirs))
    for _ in range(DRAWS):
        drawn = random.integers(0, len(keys), len(keys))
        found.append(one[drawn].mean() / two[drawn].mean())
    low, high = np.quantile(found, (0.025, 0.975))
    return f"{one.mean() / two.mean():.2f} ({low:.2f} to {high:.2f})"


def _documents(units: Mapping[Unit, Any], rows: Sequence[Row], documents: Sequence[str]) -> str:
    lines = []
    for row in rows:
        line = [_name(row)]
        for document in documents:
            there = [unit for unit in _having(units, row) if unit[0] == document]
            for metric in ("kl", "kl_gold"):
                each = [fmean(_cases(units, [u], _name(row), metric).values()) for u in there]
                line.append(", ".join(f"{value:.3f}" for value in each))
        lines.append(line)
    head = [f"{document}, {what}" for document in documents for what in ("KL", "gold")]
    return _table(["by document, one figure per seed", *head], lines) if lines else ""
