"""Runtime: capture, attach, generate, score, tap. Everything that runs a model."""

from kvedit.runtime.attaching import attach
from kvedit.runtime.calibrating import calibrate
from kvedit.runtime.capturing import Estimate, capture, estimate
from kvedit.runtime.oneshot import Score, generate, score
from kvedit.runtime.ranking import rank_layers
from kvedit.runtime.reading import ModelReader
from kvedit.runtime.recapture import recapturer
from kvedit.runtime.session import Reply, Session
from kvedit.runtime.tapping import SITES, Tap, tap

__all__ = [
    "SITES",
    "Estimate",
    "ModelReader",
    "Reply",
    "Score",
    "Session",
    "Tap",
    "attach",
    "calibrate",
    "capture",
    "estimate",
    "generate",
    "rank_layers",
    "recapturer",
    "score",
    "tap",
]
