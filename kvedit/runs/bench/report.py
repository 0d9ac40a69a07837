"""Report: the ratios of a benchmark, their spread, and the machine that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from kvedit.memory.show import human_bytes
from kvedit.runs.bench.pairs import Pair
from kvedit.runs.verbs.base import table

__all__ = ["Bar", "Ratio", "Report"]


@dataclass(frozen=True)
class Bar:
    """What a ratio should be.

    Args:
        at_most: upper limit, or None.
        at_least: lower limit, or None.
    """

    at_most: float | None = None
    at_least: float | None = None

    def holds(self, value: float) -> bool:
        """Whether ``value`` is within the limits."""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        """For example ``<= 1.05``."""
        return f">= {self.at_least:g}" if self.at_most is None else f"<= {self.at_most:g}"


@dataclass(frozen=True)
class Ratio:
    """One ratio of times, measured in pairs.

    Args:
        name: what is divided by what.
        tokens: tokens of context.
        pairs: how many pairs.
        median: median of the pairs' ratios; the number that counts.
        cpu: median of the ratios of processor seconds; beside other load, the steadier number.
        low: smallest ratio.
        high: largest ratio.
        quartiles: first and third quartile of the ratios.
        a_seconds: median time of what stands above the line.
        b_seconds: median time of what stands below it.
        bar: what the median should be, or None.
        holds: whether it is so; None without a bar.
    """

    name: str
    tokens: int
    pairs: int
    median: float
    cpu: float
    low: float
    high: float
    quartiles: tuple[float, float]
    a_seconds: float
    b_seconds: float
    bar: Bar | None
    holds: bool | None

    @classmethod
    def of(cls, name: str, tokens: int, found: Sequence[Pair], bar: Bar | None = None) -> Ratio:
        """Returns the ratio a / b of paired times."""
        ratios = sorted(pair.a.wall / pair.b.wall for pair in found)
        middle = median(ratios)
        first, _, third = quantiles(ratios, method="inclusive") if len(ratios) > 1 else [middle] * 3
        return cls(
            name=name,
            tokens=tokens,
            pairs=len(ratios),
            median=middle,
            cpu=median(pair.a.cpu / max(pair.b.cpu, 1e-9) for pair in found),
            low=ratios[0],
            high=ratios[-1],
            quartiles=(first, third),
            a_seconds=median(pair.a.wall for pair in found),
            b_seconds=median(pair.b.wall for pair in found),
            bar=bar,
            holds=None if bar is None else bar.holds(middle),
        )


@dataclass(frozen=True)
class Report:
    """All ratios of a benchmark.

    Args:
        model: what ran.
        environment: versions, threads, processors, dtype, device.
        decoded: tokens per decoding time.
        sizes: bytes of the memory, by tokens of context.
        ratios: in the order of measuring.
        seconds: of the whole benchmark.
    """

    model: str
    environment: dict[str, str]
    decoded: int
    sizes: dict[int, int]
    ratios: tuple[Ratio, ...]
    seconds: float

    def __str__(self) -> str:
        """A table, with what it was measured on above it."""
        facts = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        header = ("ratio", "tokens", "median", "min..max", "n", "cpu", "above", "below", "bar")
        rows = [_row(ratio) for ratio in self.ratios]
        sizes = ", ".join(f"{tokens}: {human_bytes(size)}" for tokens, size in self.sizes.items())
        return "\n".join(
            (
                f"{self.model}: {facts}",
                table(header, rows),
                f"memory by tokens: {sizes}; decode is {self.decoded} tokens; reuse reads from the "
                "system's page cache, checks every byte and attaches",
                f"{self.seconds:.0f} s",
            )
        )


def _row(ratio: Ratio) -> tuple[str, ...]:
    verdict = "" if ratio.bar is None else f"{ratio.bar} {'holds' if ratio.holds else 'MISSED'}"
    return (
        ratio.name,
        str(ratio.tokens),
        f"{ratio.median:.3g}",
        f"{ratio.low:.3g}..{ratio.high:.3g}",
        str(ratio.pairs),
        f"{ratio.cpu:.3g}",
        _seconds(ratio.a_seconds),
        _seconds(ratio.b_seconds),
        verdict,
    )


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
