"""The bias compiler: static attention bias turned into key deltas, with a certificate per head."""

from kvedit.editors.compiling.certificate import Certificate, HeadFigures
from kvedit.editors.compiling.compile import Compile, certify

__all__ = ["Certificate", "Compile", "HeadFigures", "certify"]
