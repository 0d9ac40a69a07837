"""Tables of the equal-KL experiment, from what was found and the journals behind it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from methods import NO_STRENGTH, Method, continuous, discrete  # beside this file
from setup import TARGET, Lab  # beside this file

Found = Mapping[str, Any]


def tables(lab: Lab, found: Found) -> str:
    """Returns all tables, in Markdown."""
    ways, ladders = continuous(lab), discrete(lab)
    parts = [
        f"n = {len(lab.parts[0])} to choose by, {len(lab.parts[1])} held out; target {TARGET}",
        _continuous(lab, found, ways),
        _ladders(found, ladders),
        _kinds(ways, ladders),
        _summary(lab, found),
    ]
    return "\n\n".join(parts)


def _continuous(lab: Lab, found: Found, ways: Mapping[str, Method]) -> str:
    rows = []
    for name, method in ways.items():
        one, other = found.get(f"main: {name}"), found.get(f"swapped: {name}")
        if one is None or "missed" in one:
            rows.append([name, method.unit, "not run" if one is None else one["missed"]])
            continue
        nearest = one["nearest"]
        lot, left = _chances(lab, name, nearest["strength"])
        rows.append([
            name, method.unit, f"{nearest['strength']:.4g}", f"{nearest['chosen_by']['value']:.4f}",
            _mean(nearest["held_out"]), f"{100 * one['error']:+.1f}", _hit(one),
            f"{100 * lot:.1f}", f"{100 * left:.1f}", str(one["needed"]), *_swapped(other),
        ])  # fmt: skip
    return _table(
        ["way", "unit", "strength", "KL, chosen by", "KL, held out", "error, %", "within 5 %",
         "by lot, ± %", "left, ± %", "needed", "swapped: strength", "error, %", "within 5 %"],
        rows,
    )  # fmt: skip


def _swapped(found: Mapping[str, Any] | None) -> list[str]:
    if found is None or "missed" in found:
        return ["not run" if found is None else "missed", "", ""]
    return [f"{found['nearest']['strength']:.4g}", f"{100 * found['error']:+.1f}", _hit(found)]


def _chances(lab: Lab, name: str, strength: float) -> tuple[float, float]:
    """Returns 95 % half-widths of the error that chance alone makes, as shares of the target.

    With parts by lot, from the spread of the KLs; and with these parts, from what no pilot explains
    of it (least squares over all prompts).
    """
    lines = (lab.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    known = {line["key"]: line["kl"] for line in map(json.loads, lines)}
    keys = lab.bystanders["context"].keys
    kl = torch.tensor([known[f"{strength!r}:{key}"] for key in keys], dtype=torch.float64)
    design = torch.tensor([[1.0, *(by[key] for by in lab.by)] for key in keys], dtype=torch.float64)
    rest = kl - design @ torch.linalg.lstsq(design, kl[:, None]).solution[:, 0]
    free = len(keys) - design.shape[1]
    sizes = math.sqrt(sum(1 / len(part) for part in lab.parts))
    spreads = (float(kl.std()), float((rest.square().sum() / free).sqrt()))
    return tuple(1.96 * spread * sizes / TARGET for spread in spreads)  # type: ignore[return-value]


def _ladders(found: Found, ladders: Mapping[str, Method]) -> str:
    rows = []
    for name, method in ladders.items():
        one = found.get(f"ladder: {name}")
        if one is None or "missed" in one:
            rows.append([name, method.unit, "not run" if one is None else one["missed"]])
            continue
        below, above = one["bracket"]
        holds = below["held_out"]["value"] <= TARGET <= above["held_out"]["value"]
        rows.append([
            name, method.unit, f"{below['strength']:g} / {above['strength']:g}",
            *(_mean(end[part]) for end in (below, above) for part in ("chosen_by", "held_out")),
            "yes" if holds else "no", str(one["crossings"]),
        ])  # fmt: skip
    return _table(
        ["way", "unit", "below / above", "below: KL, chosen by", "held out",
         "above: KL, chosen by", "held out", "target between, held out", "crossings"], rows,
    )  # fmt: skip


def _kinds(ways: Mapping[str, Method], ladders: Mapping[str, Method]) -> str:
    smooth = {method.editor: method.unit for method in ways.values()}
    steps = {method.editor: method.unit for method in ladders.values()}
    rows = [[name, "continuous", unit] for name, unit in smooth.items()]
    rows += [[name, "discrete", unit] for name, unit in steps.items() if name not in smooth]
    rows += [[name, "none", why] for name, why in NO_STRENGTH.items()]
    return _table(["editor", "strength", "what it is"], sorted(rows))


def _summary(lab: Lab, found: Found) -> str:
    lines = []
    for stage in ("main", "swapped"):
        known = {key.removeprefix(f"{stage}: "): one for key, one in found.items()
                 if key.startswith(f"{stage}:") and "missed" not in one}  # fmt: skip
        if not known:
            continue
        errors = [one["error"] for one in known.values()]
        chance = [_chances(lab, name, one["nearest"]["strength"])[1] / 1.96
                  for name, one in known.items()]  # fmt: skip
        hits = sum(abs(error) <= 0.05 for error in errors)
        inside = sum(abs(e) <= 1.96 * c for e, c in zip(errors, chance, strict=True))
        lines.append(
            f"{stage}: {hits} of {len(errors)} within 5 %, {inside} within what chance leaves; "
            f"root mean square of errors {_rms(errors)} %, of what chance leaves {_rms(chance)} %"
        )
    seconds = sum(one.get("seconds", 0.0) for one in found.values())
    return "\n".join([*lines, f"{seconds / 60:.0f} minutes of CPU for the methods"])


def _rms(values: Sequence[float]) -> str:
    return f"{100 * math.sqrt(sum(value**2 for value in values) / len(values)):.1f}"


def _hit(found: Mapping[str, Any]) -> str:
    return "yes" if abs(found["error"]) <= 0.05 else "**no**"


def _mean(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
