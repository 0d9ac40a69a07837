"""SEKA and AdaSEKA: keys of a span, amplified along learned subspaces."""

from __future__ import annotations

from kvedit.editors.seka.adaptive import AdaSeka
from kvedit.editors.seka.bias import BiasReport, effective_bias
from kvedit.editors.seka.edit import Seka
from kvedit.editors.seka.learning import learn_experts, learn_projectors
from kvedit.editors.seka.projectors import dense_projectors, random_projectors
from kvedit.editors.seka.triplets import Triplet, synthetic_triplets

__all__ = [
    "AdaSeka",
    "BiasReport",
    "Seka",
    "Triplet",
    "dense_projectors",
    "effective_bias",
    "learn_experts",
    "learn_projectors",
    "random_projectors",
    "synthetic_triplets",
]
