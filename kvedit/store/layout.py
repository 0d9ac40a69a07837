"""Layout: where a store's files lie, and how a file gets there whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store.refs import is_digest

__all__ = ["Durability", "Layout", "write_all"]

Durability = Literal["full", "process", "none"]

_FORMAT = {"format": "kvedit.store", "version": 2}
_READ = (1, 2)
_TEMPORARY = ".tmp-"
_INTENT = "intent-"
_OWN = (
    "headers",
    "index.sqlite",
    "kvedit-store.json",
    "lock",
    "log.jsonl",
    "manifests",
    "namespaces",
    "packs",
    "quarantine",
    "tmp",
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class Layout:
    """The folder of one store. It knows files and nothing of what is in them.

    Args:
        root: the folder.
        durability: ``"full"`` syncs every file and folder that it writes to the disk.
        namespace: the tenant; each has a folder of its own in there, with nothing shared.

    Raises:
        InvalidArgument: if the folder is no store of this format, or the path no local folder.
    """

    def __init__(
        self, root: str | os.PathLike[str], durability: Durability, namespace: str = ""
    ) -> None:
        if durability not in ("full", "process", "none"):
            raise InvalidArgument(
                f"durability must be 'full', 'process' or 'none', found {durability!r}"
            )
        if _URL.match(os.fspath(root)):
            raise InvalidArgument(f"{os.fspath(root)} is no local folder")
        self.root = Path(root).expanduser().absolute()
        if namespace:
            self.root = self.root / "namespaces" / digest_bytes(namespace.encode())[:32]
        self.namespace = namespace
        self.durability: Durability = durability
        self.marker = self.root / "kvedit-store.json"
        self.packs = self.root / "packs"
        self.headers = self.root / "headers"
        self.manifests = self.root / "manifests"
        self.quarantine = self.root / "quarantine"
        self.temporary = self.root / "tmp"
        self.log = self.root / "log.jsonl"
        self.index = self.root / "index.sqlite"
        self._lock: tuple[int, FileLock] | None = None
        self._made = False
        self._check()

    @property
    def lock(self) -> FileLock:
        """The lock of writers, of threads and processes alike; a thread may take it twice."""
        if self._lock is None or self._lock[0] != os.getpid():  # a lock does not outlive a fork
            self._lock = (os.getpid(), FileLock(self.root / "lock", poll_interval=0.005))
        return self._lock[1]

    def pack(self, digest: str) -> Path:
        """Returns the file of a pack."""
        return self.packs / f"{_safe(digest)}.safetensors"

    def header(self, digest: str) -> Path:
        """Returns the file that keeps the header of a pack that lies elsewhere."""
        return self.headers / f"{_safe(digest)}.safetensors"

    def manifest(self, record: str) -> Path:
        """Returns the file of a manifest in a store of version 1."""
        return self.manifests / f"{_safe(record)}.json"

    def pack_size(self, digest: str) -> int:
        """Returns the bytes of a pack's file, -1 if there is none."""
        try:
            return self.pack(digest).stat().st_size
        except OSError:  # also a link that leads nowhere
            return -1

    def exists(self) -> bool:
        """Returns whether the store was written to before."""
        return self.marker.exists()

    def create(self) -> None:
        """Makes folder, marker and log where they are missing."""
        if self._made and self.log.exists():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with self.lock:
            for folder in (self.temporary, self.packs, self.headers):
                folder.mkdir(exist_ok=True)
            # The log first: a store that has its marker has all it needs to be read.
            if not self.log.exists():
                self._start_log()
            if not self.exists() or self._version() != _FORMAT["version"]:
                self.publish(self.marker, [canonical_json(_FORMAT)])
            self.sync_folder(self.root)
        self._made = True

    def _start_log(self) -> None:
        # An empty log in a store that holds memories would forget what was put and removed.
        if any(self.packs.glob("*.safetensors")) or any(self.manifests.glob("*.json")):
            raise CorruptMemory(f"{self.log} is missing: restore it from a backup")
        self.log.touch()

    def publish(self, path: Path, chunks: Iterable[bytes | memoryview]) -> int:
        """Returns the size of a file that it writes: temporary name, sync, rename, sync folder.

        On failure the temporary file is removed, and so is a file that was not there before.
        """
        existed = path.exists()
        temporary = self.temporary / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            size = self._write(temporary, chunks)
            os.replace(temporary, path)  # noqa: PTH105 - one name for fault injection
            self.sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            if not existed:
                path.unlink(missing_ok=True)
            raise
        return size

    def _write(self, path: Path, chunks: Iterable[bytes | memoryview], sync: bool = True) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = os.open(path, flags, 0o666)
        try:
            size = sum(write_all(file, chunk) for chunk in chunks)
            if sync:
                self.sync(file)
        finally:
            os.close(file)
        return size

    def sync(self, file: int) -> None:
        """Waits until an open file is on the disk, if the durability asks for it."""
        # A failed fsync is never tried again: the kernel has dropped the pages by then.
        if self.durability == "full":
            os.fsync(file)

    def sync_folder(self, folder: Path) -> None:
        """Waits until a folder's names are on the disk, if the durability asks for it."""
        if self.durability != "full" or os.name == "nt":  # Windows opens no folders
            return
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    @contextmanager
    def intent(self, packs: Iterable[str]) -> Iterator[None]:
        """Writes down, for as long as it takes, which packs appear or go.

        Where the process dies inside, the next one finds the note and removes those of the packs
        that the index does not know. No sync: after a loss of power there may be files too many,
        which a collection of garbage finds, and never one too few.
        """
        names = sorted(packs)
        if not names:
            yield
            return
        path = self.temporary / f"{_INTENT}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self._write(path, [canonical_json(names)], sync=False)
            yield
        except Exception:
            self._forget(path)  # what failed has cleaned up; an interrupt may not have
            raise
        self._forget(path)

    def _forget(self, path: Path) -> None:
        with suppress(OSError):  # a note too many is harmless: the next one to open reads it
            path.unlink(missing_ok=True)

    def intended(self) -> list[str]:
        """Returns the packs of writers that died, and forgets them; the caller holds the lock."""
        found: list[str] = []
        for path in self.temporary.glob(f"{_INTENT}*"):
            with suppress(ValueError, OSError):
                found += [name for name in json.loads(path.read_bytes()) if is_digest(name)]
        return found

    def sweep(self) -> None:
        """Removes temporary files of writers that died; the caller holds the lock."""
        for path in self.temporary.glob("*"):
            path.unlink(missing_ok=True)
        if self.exists() and self._version() == 1:
            for folder in (self.root, self.packs, self.manifests):
                for path in folder.glob(f"{_TEMPORARY}*"):
                    path.unlink(missing_ok=True)

    def try_lock(self) -> bool:
        """Returns whether the lock was free; it is held then."""
        with suppress(Timeout, OSError):  # also where the folder can only be read
            self.lock.acquire(timeout=0)
            return True
        return False

    def _check(self) -> None:
        # A store from elsewhere may come with links to anything: what is swept, collected or
        # written over must be its own.
        for name in _OWN:
            if (self.root / name).is_symlink():
                raise InvalidArgument(
                    f"{self.root / name} is a link: a store has none; put the whole folder where "
                    "it should lie, and link to that"
                )
        if not self.exists():
            names = [path.name for path in self.root.iterdir()] if self.root.is_dir() else []
            # A first put that died left no more than these; one that goes on may have ended now.
            ours = ["lock", "namespaces", "tmp", "packs", "headers", self.marker.name]
            with suppress(FileNotFoundError, NotADirectoryError):
                ours += [self.log.name] if self.log.stat().st_size == 0 else []
            if self.root.is_file() or not (
                all(name in ours or name.startswith(_TEMPORARY) for name in names) or self.exists()
            ):
                raise InvalidArgument(
                    f"{self.root} is not empty and has no {self.marker.name}: it is no store; "
                    "choose an empty folder"
                )
            return
        self._version()

    def _version(self) -> int:
        try:
            found = json.loads(self.marker.read_bytes())
            name, version = found["format"], found["version"]
        except (ValueError, TypeError, LookupError) as error:
            raise CorruptMemory(f"{self.marker} is damaged: it should hold {_FORMAT}") from error
        if name != _FORMAT["format"] or version not in _READ:
            raise InvalidArgument(
                f"{self.root} has format {name} version {version}; this kvedit reads "
                f"{_FORMAT['format']} versions 1 and 2: use a newer kvedit"
            )
        return int(version)


def write_all(file: int, data: bytes | memoryview) -> int:
    """Writes all of ``data`` to an open file and returns its size; a write may be short."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    done = 0
    while done < len(view):
        done += os.write(file, view[done:])
    return done


def _safe(digest: str) -> str:
    if not is_digest(digest):
        raise CorruptMemory(f"{digest!r} is no digest; it can't name a file")
    return digest
