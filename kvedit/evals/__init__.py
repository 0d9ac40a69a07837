"""Evals: what a memory or an edit does to a model's behaviour, with its uncertainty."""

from kvedit.evals.divergence import Divergence, ProbeResult, divergence, token_divergence

__all__ = ["Divergence", "ProbeResult", "divergence", "token_divergence"]
