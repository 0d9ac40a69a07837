"""Head profiling: which heads of a model carry emphasis, and how sure that is."""

from kvedit.evals.profiling.atlas import HeadAtlas
from kvedit.evals.profiling.candidates import join, single_heads, single_layers
from kvedit.evals.profiling.control import (
    Contrast,
    KLCurves,
    RandomControl,
    contrast,
    kl_curves,
    random_control,
)
from kvedit.evals.profiling.effects import Effects, HeadScore
from kvedit.evals.profiling.measuring import Case, Setting, measure
from kvedit.evals.profiling.probe import Probe, read_probes
from kvedit.evals.profiling.profiler import measure_all, profile
from kvedit.evals.profiling.selection import intersection, task_agnostic, union

__all__ = [
    "Case",
    "Contrast",
    "Effects",
    "HeadAtlas",
    "HeadScore",
    "KLCurves",
    "Probe",
    "RandomControl",
    "Setting",
    "contrast",
    "intersection",
    "join",
    "kl_curves",
    "measure",
    "measure_all",
    "profile",
    "random_control",
    "read_probes",
    "single_heads",
    "single_layers",
    "task_agnostic",
    "union",
]
