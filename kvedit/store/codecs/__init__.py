"""Codecs: how the bytes of a block look at rest."""

from kvedit.store.codecs.approximation import approximate
from kvedit.store.codecs.codec import CODECS, LOSSLESS, LOSSY, Encoded, decode, encode, quantise
from kvedit.store.codecs.error import CodecError, check_against_edit

__all__ = [
    "CODECS",
    "LOSSLESS",
    "LOSSY",
    "CodecError",
    "Encoded",
    "approximate",
    "check_against_edit",
    "decode",
    "encode",
    "quantise",
]
