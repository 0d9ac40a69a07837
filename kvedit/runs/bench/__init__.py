"""bench: capture, decoding and reuse, each beside the plain model, as ratios of paired times."""

from kvedit.runs.bench.plan import Plan
from kvedit.runs.bench.report import Ratio, Report
from kvedit.runs.bench.suite import bench

__all__ = ["Plan", "Ratio", "Report", "bench"]
