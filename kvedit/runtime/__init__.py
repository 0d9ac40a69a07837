"""Runtime: capture, attach, generate, score, tap. Everything that runs a model."""

from kvedit.runtime.capturing import Estimate, capture, estimate
from kvedit.runtime.oneshot import Score, generate, score
from kvedit.runtime.session import Reply, Session, attach

__all__ = ["Estimate", "Reply", "Score", "Session", "attach", "capture", "estimate", "generate", "score"]
