"""Tables and figure of the compaction experiment, from its journals alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from methods import DEFAULT, METHODS  # beside this file

from kvedit.evals.bootstrap import Mean, mean, paired_difference

COLUMNS = {"kl": "KL", "kl_gold": "KL, gold", "nll_gold": "NLL, gold", "agreement": "agreement",
           "f1": "F1", "contains": "contains"}  # fmt: skip
BEST = "AM, heads by peak"
"""What other methods are compared with, beside Attention Matching as it comes."""
MAIN = 10.0
"""The ratio at which all methods are."""
MARKS = "osD^vP"
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""Document to its journal."""


def journal_path(folder: Path, document: str) -> Path:
    """Returns where what was found about a document is."""
    return folder / "units" / f"{document}.jsonl"


def tables(folder: Path, documents: Sequence[str]) -> str:
    """Returns all tables, in Markdown."""
    records = {document: _lines(journal_path(folder, document)) for document in documents}
    parts = [_texts(records), _means(records), _differences(records), _documents(records)]
    parts += [_sizes(records, metric) for metric in ("kl", "kl_gold", "f1")]
    return "\n\n".join(parts)


def figure(folder: Path, documents: Sequence[str]) -> Any:
    """Returns KL on the model's own and on right answers, against the ratio."""
    from kvedit.plots.grid import new_figure

    records = {document: _lines(journal_path(folder, document)) for document in documents}
    made, panels = new_figure(12.5, 4.6, 2)
    for axes, metric in zip(panels, ("kl", "kl_gold"), strict=True):
        names = _at_sizes(records)
        for number, name in enumerate(names):
            ratios = [r for r in _ratios(records) if _cases(records, name, r, metric)]
            found = [mean(list(_cases(records, name, r, metric).values())) for r in ratios]
            ends = [(m.value, m.low or m.value, m.high or m.value) for m in found]
            errors = [[v - low for v, low, _ in ends], [high - v for v, _, high in ends]]
            # Beside each other, or the intervals of one ratio hide each other.
            beside = [ratio * 1.02 ** (number - (len(names) - 1) / 2) for ratio in ratios]
            axes.errorbar(beside, [v for v, _, _ in ends], yerr=errors, marker=MARKS[number % 6],
                          label=name, capsize=2, elinewidth=0.8, markersize=5)  # fmt: skip
        nothing = mean(list(_cases(records, "nothing", 1, metric).values()))
        axes.axhline(nothing.value, color="0.4", linestyle=":", label="no context")
        axes.set(xscale="log", yscale="log", ylabel=f"{COLUMNS[metric]} (nats per token)",
                 xlabel="slots of the full context over those of the memory")  # fmt: skip
        axes.set_xticks(_ratios(records), [f"{ratio:g}x" for ratio in _ratios(records)])
        axes.minorticks_off()
        axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.grid(alpha=0.25)
    panels[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    n = len(_cases(records, "nothing", 1, "kl"))
    made.suptitle(f"{len(documents)} articles, {n} questions, 95 % intervals over questions")
    return made


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "key" in line]


def _units(records: Records, name: str, ratio: float) -> list[Mapping[str, Any]]:
    return [u for lines in records.values() for u in lines
            if u["method"] == name and u["ratio"] == ratio]  # fmt: skip


def _cases(records: Records, name: str, ratio: float, metric: str) -> dict[str, float]:
    """Returns question to its mean over seeds; nothing where a document is not there yet."""
    if any(not _units({d: lines}, name, ratio) for d, lines in records.items()):
        return {}
    found: dict[str, list[float]] = {}
    for unit in _units(records, name, ratio):
        for probe, scores in unit["probes"].items():
            if metric in scores:
                found.setdefault(probe, []).append(scores[metric])
    return {probe: fmean(values) for probe, values in found.items()}


def _there(records: Records, ratio: float) -> list[str]:
    return [name for name in METHODS if _cases(records, name, ratio, "kl")]


def _ratios(records: Records) -> list[float]:
    return sorted({u["ratio"] for lines in records.values() for u in lines if u["ratio"] > 1})


def _at_sizes(records: Records) -> list[str]:
    others = [ratio for ratio in _ratios(records) if ratio != MAIN]
    return [n for n in METHODS if any(_cases(records, n, ratio, "kl") for ratio in others)]


def _shown(found: Mean, digits: int = 3) -> str:
    spread = "" if found.low is None else f" ({found.low:.{digits}f} to {found.high:.{digits}f})"
    return f"{found.value:.{digits}f}{spread}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _texts(records: Records) -> str:
    sizes = {
        document: (unit["size"]["slots"], len(unit["probes"]))
        for document, lines in records.items()
        for unit in lines
        if unit["method"] == "full"
    }
    return "\n".join(f"{name}: {s:g} slots, {n} questions" for name, (s, n) in sizes.items())


def _means(records: Records) -> str:
    rows = []
    for name, ratio in [("full", 1.0), ("nothing", 1.0), *((n, MAIN) for n in METHODS)]:
        if not _cases(records, name, ratio, "kl"):
            continue
        units = _units(records, name, ratio)
        cells = [_shown(mean(list(_cases(records, name, ratio, m).values())), 2 + (m == "kl"))
                 for m in COLUMNS]  # fmt: skip
        megabytes = fmean(unit["size"]["nbytes"] for unit in units) / 1e6
        times = [f"{fmean(u[t] for u in units):.1f}" if t in units[0] else ""
                 for t in ("cpu", "wall")]  # fmt: skip
        seeds = str(len({unit["seed"] for unit in units}))
        rows.append([name, seeds, *cells, f"{megabytes:.1f}", *times])
    return _table(["method", "seeds", *COLUMNS.values(), "MB", "CPU s", "wall s"], rows)


def _differences(records: Records) -> str:
    rows = []
    for name in _there(records, MAIN):
        line = [name]
        for base in (DEFAULT, BEST):
            for metric in ("kl", "kl_gold"):
                a, b = (_cases(records, n, MAIN, metric) for n in (name, base))
                line.append(_shown(paired_difference(a, b)) if b and name != base else "")
        rows.append(line)
    head = [f"{metric} − {base}" for base in (DEFAULT, BEST) for metric in ("KL", "KL, gold")]
    return "Paired differences\n\n" + _table(["method", *head], rows)


def _documents(records: Records) -> str:
    def cell(name: str, document: str) -> str:
        one = {document: records[document]}
        own = _cases(one, name, MAIN, "kl")
        if name == DEFAULT or not _cases(one, DEFAULT, MAIN, "kl"):
            return f"{fmean(own.values()):.3f}"
        found = paired_difference(own, _cases(one, DEFAULT, MAIN, "kl"))
        return f"{fmean(own.values()):.3f}, {_shown(found, 2)}"

    rows = [[name, *(cell(name, d) for d in records)] for name in _there(records, MAIN)]
    title = f"KL by document, and its paired difference to {DEFAULT}"
    return f"{title}\n\n" + _table(["method", *records], rows)


def _sizes(records: Records, metric: str) -> str:
    ratios = _ratios(records)

    def row(name: str, value: Callable[[str, float], str]) -> list[str]:
        return [name, *(value(name, ratio) for ratio in ratios)]

    def shown(name: str, ratio: float) -> str:
        cases = _cases(records, name, ratio, metric)
        return _shown(mean(list(cases.values()))) if cases else ""

    rows = [row(name, shown) for name in _at_sizes(records)]
    return f"{COLUMNS[metric]} by size\n\n" + _table(
        ["method", *(f"{ratio:g}×" for ratio in ratios)], rows
    )
