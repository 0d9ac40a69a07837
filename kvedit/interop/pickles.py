"""Pickles, refused by name: reading one can run anything."""

from __future__ import annotations

from kvedit.errors import InvalidArgument

__all__ = ["looks_pickled", "refuse_pickle"]

_ZIP, _PROTOCOL = b"PK\x03\x04", b"\x80"


def looks_pickled(data: bytes) -> bool:
    """Returns whether bytes begin as a pickle of Python or a checkpoint of torch does."""
    return data.startswith(_ZIP) or (data[:1] == _PROTOCOL and data[1:2] <= b"\x05")


def refuse_pickle(data: bytes, where: str) -> None:
    """Raises if it is a pickle.

    Raises:
        InvalidArgument: with what to do.
    """
    if looks_pickled(data):
        raise InvalidArgument(
            f"{where} is a pickle (of torch.save, or of Python), and reading one can run anything "
            "on this machine. Load it yourself where you trust it, and pass the object: "
            "from_steering_vectors, from_repeng"
        )
