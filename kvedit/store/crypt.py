"""Cipher: seals what a store writes, with AES-256-GCM and one key per namespace."""

from __future__ import annotations

import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kvedit.errors import CorruptMemory, InvalidArgument, MissingDependency
from kvedit.memory.digest import canonical_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["OVERHEAD", "Cipher", "is_file", "read_secret"]

OVERHEAD = 28
"""Bytes that sealing adds: a nonce of 12 in front, a tag of 16 behind."""

_KEY = 32
_NONCE = 12
_LONGEST = 2**31 - 1  # what the library seals at once
_SECRET_FILE = 1 << 16
_HEX = re.compile(r"[0-9a-fA-F]{64}")
_SHORT_HEX = re.compile(rb"[0-9a-fA-F]{32}")


@dataclass(frozen=True)
class Cipher:
    """Seals and opens blocks and manifests of one namespace; made by ``Cipher.from_key``.

    AES-256-GCM (NIST SP 800-38D) with a random nonce. Digest, role and namespace are
    authenticated with the bytes: sealed bytes open only in the place that they were made for.
    A random nonce of 96 bits is good for 2^32 seals of one key; take a new key before that.
    Lengths, digests and names are not hidden.

    Args:
        namespace: whose key it is.
        _key: the namespace's key, 32 bytes.
    """

    namespace: str
    _key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Refuses keys of AES-128 and AES-192, which the library would take."""
        if len(self._key) != _KEY:
            raise InvalidArgument(f"a cipher's key has {_KEY} bytes, found {len(self._key)}")

    @classmethod
    def from_key(cls, key: bytes | str | Path, namespace: str) -> Cipher:
        """Returns the cipher of a namespace, its key derived with HKDF-SHA256 (RFC 5869).

        Args:
            key: the store's key: 32 random bytes; 64 hex characters; or the path of a file that
                holds one of these and that only its owner can read.
            namespace: any text. Another namespace has another key.

        Raises:
            InvalidArgument: if there is no such key. The message never holds the key.
            MissingDependency: if ``cryptography`` is not installed.
        """
        try:
            info = b"kvedit.store.1\0" + namespace.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                f"a namespace must be valid Unicode text, found {namespace!r}"
            ) from error
        return cls(namespace, _derive(_store_key(key), info, _KEY))

    @cached_property
    def fingerprint(self) -> str:
        """Public id of the derived key, 16 hex characters; another key has another one."""
        return _derive(self._key, b"kvedit.fingerprint.1", 8).hex()

    def seal(self, data: bytes | bytearray | memoryview, digest: str, role: str) -> bytes:
        """Returns nonce, ciphertext and tag: ``OVERHEAD`` bytes more than ``data``.

        Args:
            data: at most 2 GiB - 1, contiguous.
            digest: what the bytes are known by.
            role: what they are, for example ``"block"`` or ``"manifest"``.

        Raises:
            InvalidArgument: if there are more bytes.
            MissingDependency: if ``cryptography`` is not installed.
        """
        if len(plain := _flat(data)) > _LONGEST:
            raise InvalidArgument(
                f"{role} {digest} has {len(plain)} bytes, at most {_LONGEST} can be sealed at "
                "once: put it in smaller blocks"
            )
        nonce = secrets.token_bytes(_NONCE)
        return nonce + _aead(self._key).encrypt(nonce, plain, self._place(digest, role))

    def open(self, data: bytes | bytearray | memoryview, digest: str, role: str) -> bytes:
        """Returns the bytes that were sealed as this role of this digest.

        Args:
            data: what ``seal`` returned.
            digest: as it was given to ``seal``.
            role: likewise.

        Raises:
            CorruptMemory: if they were sealed with another key or for another place, or were
                changed since.
            MissingDependency: if ``cryptography`` is not installed.
        """
        sealed = _flat(data)
        plain = None if len(sealed) < OVERHEAD else self._opened(sealed, self._place(digest, role))
        if plain is None:
            raise CorruptMemory(
                f"{role} {digest} can't be opened with key {self.fingerprint} of namespace "
                f"{self.namespace!r}: either it was sealed with another key, or its "
                f"{len(sealed)} bytes were changed, cut or put in another's place. The bytes "
                "can't tell which: check the key first, then restore them from a copy"
            )
        return plain

    def _opened(self, sealed: memoryview, place: bytes) -> bytes | None:
        aead = _aead(self._key)
        from cryptography.exceptions import InvalidTag

        try:
            return aead.decrypt(sealed[:_NONCE], sealed[_NONCE:], place)
        except InvalidTag:
            return None

    def _place(self, digest: str, role: str) -> bytes:
        return canonical_json({"digest": digest, "namespace": self.namespace, "role": role})


def is_file(text: str) -> bool:
    """Returns whether a text is the path of a file; any text may be asked."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or holds a NUL
        return False


def read_secret(path: Path) -> bytes:
    """Returns the bytes of a file with a secret key.

    Raises:
        InvalidArgument: if it is no file, over 64 KiB, or open to others than its owner (where
            the system has such permissions).
    """
    if not path.is_file():
        raise InvalidArgument(f"{path} should be a file with a key: there is no such file")
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode  # of the file that is read, not of its name
            data = file.read(_SECRET_FILE + 1)
    except OSError as error:
        raise InvalidArgument(f"{path} should be a file with a key: {error.strerror}") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InvalidArgument(
            f"{path} holds a key and others than its owner may use it (mode "
            f"{stat.S_IMODE(mode):03o}): chmod 600 {path}"
        )
    if len(data) > _SECRET_FILE:
        raise InvalidArgument(f"{path} has more than {_SECRET_FILE} bytes: it is no key")
    return data


def _store_key(key: bytes | str | Path) -> bytes:
    if isinstance(key, bytes) and len(key) == _KEY:
        return key
    if isinstance(key, str) and _HEX.fullmatch(key):
        return bytes.fromhex(key)
    if isinstance(key, Path) or (isinstance(key, str) and is_file(key)):
        return _file_key(Path(key))
    # A key that was mistyped is still nearly the key: it is not repeated here.
    size = f" of length {len(key)}" if isinstance(key, bytes | str) else ""
    raise InvalidArgument(
        f"a store's key is {_KEY} bytes, {2 * _KEY} hex characters, or the path of a file that "
        f"holds one of these; found {type(key).__name__}{size}"
    )


def _file_key(path: Path) -> bytes:
    data = read_secret(path)
    # 32 raw bytes that all are hex characters: somebody's key of 128 bits, not one of 256.
    if len(data) == _KEY and not _SHORT_HEX.fullmatch(data):
        return data
    text = data.strip().decode("ascii", errors="replace")
    if not _HEX.fullmatch(text):
        raise InvalidArgument(
            f"{path} should hold a key of {_KEY} bytes or {2 * _KEY} hex characters; it has "
            f"{len(data)} bytes that are neither"
        )
    return bytes.fromhex(text)


def _flat(data: bytes | bytearray | memoryview) -> memoryview:
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # cast refuses empty shapes


def _missing() -> MissingDependency:
    return MissingDependency("cryptography", "crypto", "An encrypted store")


def _derive(key: bytes, info: bytes, length: int) -> bytes:
    try:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise _missing() from error
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(key)


def _aead(key: bytes) -> AESGCM:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise _missing() from error
    return AESGCM(key)
