"""Files and folders that get to their place whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvedit.errors import InvalidArgument

__all__ = ["new_file", "new_folder"]


@contextmanager
def new_folder(
    target: str | os.PathLike[str], overwrite: bool, own: Collection[str]
) -> Iterator[Path]:
    """Yields an empty folder beside ``target``, which becomes ``target`` when the block is done.

    Args:
        target: the folder to make.
        overwrite: whether a folder of that name is replaced; only one that holds nothing but
            files of this format is.
        own: names of the files that the format writes.

    Raises:
        InvalidArgument: if something is in the way, or the place to write in is missing.
    """
    path = Path(target)
    _check_free(path, overwrite, set(own))
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:100]}."))
    try:
        yield work
        for file in work.iterdir():
            _sync(file)
        _sync(work)
        _take_place(work, path, overwrite)
        _sync(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def new_file(target: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Yields the path of a file beside ``target``, which becomes ``target`` at the end.

    Args:
        target: the file to make.
        overwrite: whether a file of that name is replaced.

    Raises:
        InvalidArgument: if something is in the way, or the place to write in is missing.
    """
    path = Path(target)
    if path.is_dir() or (path.exists() and not overwrite) or not path.parent.is_dir():
        raise InvalidArgument(
            f"{path} exists, or its folder does not: choose another file"
            + ("" if path.is_dir() else ", or overwrite it")
        )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:100]}.") as work:
        made = Path(work, "file")
        yield made
        made.chmod(0o600)
        _sync(made)
        if overwrite:
            made.replace(path)
            return
        try:
            path.hardlink_to(made)  # fails where somebody else made it meanwhile
        except FileExistsError:
            raise InvalidArgument(f"{path} exists: choose another file") from None


def _check_free(path: Path, overwrite: bool, own: set[str]) -> None:
    if not path.parent.is_dir():
        raise InvalidArgument(f"{path.parent} is no folder: make it first")
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise InvalidArgument(f"{path} exists: choose another folder, or overwrite it")
    if path.is_symlink() or not path.is_dir():
        raise InvalidArgument(f"{path} is no folder: choose another place")
    foreign = sorted(file.name for file in path.iterdir() if file.name not in own)
    if foreign:
        raise InvalidArgument(
            f"{path} holds {foreign[0]!r}, which this format does not write: only a folder of "
            "nothing but its own files is overwritten"
        )


def _take_place(work: Path, path: Path, overwrite: bool) -> None:
    if not (overwrite and path.exists()):
        try:
            work.rename(path)
        except OSError as error:
            raise InvalidArgument(f"{path} can't be made: {error}") from error
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:100]}.old."))
    path.rename(old / "old")
    try:
        work.rename(path)
    except BaseException:
        (old / "old").rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    # Some systems can't sync folders.
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
