"""Tables of the cache steering experiment, from reports whose seeds are put together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from setup import (  # beside this file
    ACCURACY_BELOW_NONE,
    KL_AT_MOST,
    OTHERS_AT_MOST,
    REPEAT_ABOVE_NONE,
    STEERED_AT_LEAST,
)

from kvedit.evals.bootstrap import Mean, mean, paired_difference
from kvedit.evals.steering import StyleReport

COLUMNS = {"marked": "marked", "two": "two markers", "begins": "begins so",
           "opening": "log P(First)", "accuracy": "right", "length": "tokens",
           "distinct_2": "distinct pairs", "repeat": "repeat", "kl": "KL, unrelated",
           "flipped": "flipped"}  # fmt: skip
_BEGINS = re.compile(r"\W*(?:first|firstly|to begin|to start|step\s*(?:1|one))\b", re.IGNORECASE)

Reports = Mapping[int, StyleReport]
"""Seed to its report."""


def tables(main: Reports, keys: Reports) -> str:
    """Returns all tables, in Markdown."""
    every, about = names(main), names(keys)[-4:]
    few = {seed: next(iter(report.rows.values())).answers for seed, report in keys.items()}
    n = len(cases(main, "none", "marked"))
    m, moved = sum(map(len, few.values())), len(cases(main, "none", "kl"))
    parts = [f"n = {n} questions, {moved} bystanders", means(main, every), differences(main, every)]
    parts += [by_seed(main, every), bars(main)]
    parts += [f"Keys: n = {m} questions", means(keys, ["none", *about])]
    pairs = [(about[1], about[0]), (about[2], about[0]), (about[3], about[0]),
             (about[1], about[2]), (about[1], about[3])]  # fmt: skip
    return "\n\n".join([*parts, paired(keys, pairs)])


def names(reports: Reports) -> list[str]:
    """Returns methods; each seed's random direction is one of them, by one name."""
    first = next(iter(reports.values()))
    every = ["random" if name.startswith("random ") else name for name in first.names]
    return list(dict.fromkeys(every))


def cases(reports: Reports, name: str, metric: str) -> dict[str, float]:
    """Returns a metric question by question, or prompt by prompt, of all seeds."""
    found: dict[str, float] = {}
    for seed, report in reports.items():
        # One random direction or several: a question's value is their mean.
        rows = [r for r in report.names if r.startswith("random ")] if name == "random" else [name]
        each = [_values(report, row, metric) for row in rows]
        found |= {f"{seed} {key}": fmean(row[key] for row in each) for key in each[0]}
    return found


def _values(report: StyleReport, row: str, metric: str) -> dict[str, float]:
    if metric == "two":
        return {k: float(v >= 2) for k, v in report.values(row, "markers").items()}
    if metric == "begins":
        return {r.key: float(_BEGINS.match(r.answer) is not None) for r in report.of(row).answers}
    return dict(report.values(row, metric))


def means(reports: Reports, rows: Sequence[str]) -> str:
    """Returns a line per method."""
    lines = [[row, *(_shown(_mean(reports, row, m), m) for m in COLUMNS)] for row in rows]
    return _table(["method", *COLUMNS.values()], lines)


def differences(reports: Reports, rows: Sequence[str]) -> str:
    """Returns values in the cache against every other row, over the same questions."""
    return paired(reports, [("values", row) for row in rows if row != "values"])


def paired(reports: Reports, pairs: Iterable[tuple[str, str]]) -> str:
    """Returns paired differences."""
    metrics = ("marked", "begins", "opening", "accuracy", "repeat", "kl")
    lines = []
    for one, other in pairs:
        found = [paired_difference(*(cases(reports, name, m) for name in (one, other)))
                 for m in metrics]  # fmt: skip
        cells = [_shown(d, m) for d, m in zip(found, metrics, strict=True)]
        lines.append([f"{one} − {other}", *cells])
    return _table(["difference", *(COLUMNS[m] for m in metrics)], lines)


def by_seed(reports: Reports, rows: Sequence[str]) -> str:
    """Returns marker rates of each seed."""
    lines = [
        [row, *(_shown(_mean({seed: report}, row, "marked"), "marked")
                for seed, report in reports.items())]
        for row in rows
    ]  # fmt: skip
    return _table(["marked", *(f"seed {seed}" for seed in reports)], lines)


def bars(reports: Reports, row: str = "values") -> str:
    """Returns what was asked for beforehand, and what came."""

    def of(name: str, metric: str) -> Mean:
        return _mean(reports, name, metric)

    def above(metric: str) -> Mean:
        return paired_difference(*(cases(reports, name, metric) for name in (row, "none")))

    asked = [
        (f"{row}: marked", f"≥ {STEERED_AT_LEAST}", of(row, "marked"), "marked",
         of(row, "marked").value >= STEERED_AT_LEAST),
        ("none: marked", f"≤ {OTHERS_AT_MOST}", of("none", "marked"), "marked",
         of("none", "marked").value <= OTHERS_AT_MOST),
        ("random: marked", f"≤ {OTHERS_AT_MOST}", of("random", "marked"), "marked",
         of("random", "marked").value <= OTHERS_AT_MOST),
        (f"{row}: KL, unrelated", f"≤ {KL_AT_MOST}", of(row, "kl"), "kl",
         of(row, "kl").value <= KL_AT_MOST),
        (f"{row} − none: repeat", f"≤ {REPEAT_ABOVE_NONE}", above("repeat"), "repeat",
         above("repeat").value <= REPEAT_ABOVE_NONE),
        (f"{row} − none: right", f"≥ −{ACCURACY_BELOW_NONE}", above("accuracy"), "accuracy",
         above("accuracy").value >= -ACCURACY_BELOW_NONE),
    ]  # fmt: skip
    lines = [[what, bar, _shown(found, metric), "met" if met else "**missed**"]
             for what, bar, found, metric, met in asked]  # fmt: skip
    return _table(["what", "bar", "found", ""], lines)


def _mean(reports: Reports, name: str, metric: str) -> Mean:
    values = list(cases(reports, name, metric).values())
    shares = ("marked", "two", "begins", "accuracy")
    return _wilson(values) if metric in shares and len(set(values)) == 1 else mean(values)


def _wilson(values: Sequence[float]) -> Mean:
    # All alike: resamples would be, too. Wilson's interval for a share of 0 or 1.
    n, reach = len(values), 1.96**2 / (len(values) + 1.96**2)
    low, high = (0.0, reach) if values[0] == 0 else (1 - reach, 1.0)
    return Mean(values[0], low, high, n)


def _shown(found: Mean, metric: str) -> str:
    digits = 3 if metric in ("kl", "repeat") else 1 if metric == "length" else 2
    spread = "" if found.low is None else f" ({found.low:.{digits}f} to {found.high:.{digits}f})"
    return f"{found.value:.{digits}f}{spread}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
