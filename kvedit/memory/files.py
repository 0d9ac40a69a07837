"""How a small file gets into a folder whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Writes a file so that readers see all of it, or what stood there before.

    Args:
        path: the file; its folder is made.
        data: what it shall hold.
        sync: whether it is on the disk before it takes its name, so that a power cut leaves no
            half one either. A cache that can be made again does without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name may be nearly as long as a file system takes.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
