"""Signer: Ed25519 signatures over record digests, and the check against trusted keys."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument, MissingDependency, UntrustedMemory
from kvedit.memory.digest import canonical_json
from kvedit.store.crypt import is_file, read_secret
from kvedit.store.refs import is_digest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["Signature", "Signer", "check"]

_SEED = 32
_HEX = re.compile(r"[0-9a-fA-F]{64}")
_PUBLIC = re.compile(r"[0-9a-f]{64}")
_VALUE = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True)
class Signature:
    """A signature and the key that is said to have made it.

    Args:
        key: public key, 64 lower-case hex characters.
        value: the signature, 128 lower-case hex characters.

    Raises:
        InvalidArgument: (a ``ValueError``) if one is anything else.
    """

    key: str
    value: str

    def __post_init__(self) -> None:
        """Refuses what can't be a signature."""
        for name, form in (("key", _PUBLIC), ("value", _VALUE)):
            found = getattr(self, name)
            if not isinstance(found, str) or not form.fullmatch(found):
                raise InvalidArgument(
                    f"a signature's {name} is {64 if name == 'key' else 128} lower-case hex "
                    f"characters, found {_short(found)}"
                )

    def to_json(self) -> dict[str, str]:
        """Returns the form in which it is stored."""
        return {"key": self.key, "value": self.value}

    @classmethod
    def from_json(cls, data: Any) -> Signature:
        """Returns the signature that ``to_json`` wrote.

        Raises:
            InvalidArgument: (a ``ValueError``) if ``data`` is anything else.
        """
        if not isinstance(data, dict) or data.keys() != {"key", "value"}:
            raise InvalidArgument(
                f"a signature is an object with 'key' and 'value', found {_short(data)}"
            )
        return cls(data["key"], data["value"])


@dataclass(frozen=True)
class Signer:
    """Signs record digests with one Ed25519 key (RFC 8032); made by ``from_key``, ``generate``.

    A signature says that the key's owner put this record into this namespace. It covers neither
    the name nor the version: who can write to a store can still move names between signed records.

    Args:
        _seed: the secret key, 32 bytes.
    """

    _seed: bytes = field(repr=False)
    public: str = field(init=False)
    """The public key, 64 hex characters."""

    def __post_init__(self) -> None:
        """Computes the public key."""
        object.__setattr__(self, "public", self._private().public_key().public_bytes_raw().hex())

    @classmethod
    def from_key(cls, key: bytes | str | Path) -> Signer:
        """Returns the signer of a secret key.

        Args:
            key: 32 bytes; 64 hex characters; PEM or OpenSSH text without a password, as bytes;
                or the path of a file that holds one of these and that only its owner can read.

        Raises:
            InvalidArgument: if it is no such key. The message never holds the key.
            MissingDependency: if ``cryptography`` is not installed.
        """
        if isinstance(key, Path) or (
            isinstance(key, str) and not _HEX.fullmatch(key) and is_file(key)
        ):
            return cls(_seed(read_secret(Path(key)), f"{key}"))
        return cls(_seed(key.encode() if isinstance(key, str) else key, "the key"))

    @classmethod
    def generate(cls) -> Signer:
        """Returns a signer with a new random key; ``save`` keeps it.

        Raises:
            MissingDependency: if ``cryptography`` is not installed.
        """
        return cls(secrets.token_bytes(_SEED))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the secret key to a new file (PEM, PKCS 8) that only its owner can read.

        Raises:
            FileExistsError: if there is such a file: a key is never overwritten.
        """
        from cryptography.hazmat.primitives import serialization as form

        data = self._private().private_bytes(
            form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()
        )
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)

    def sign(self, record: str, namespace: str) -> Signature:
        """Returns the signature of a record in a namespace.

        Args:
            record: record digest, 64 hex characters.
            namespace: where the record is put.

        Raises:
            InvalidArgument: if ``record`` is no digest.
        """
        value = self._private().sign(_message(record, namespace))
        return Signature(self.public, value.hex())

    def _private(self) -> Ed25519PrivateKey:
        try:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        except ImportError as error:
            raise _missing() from error
        return Ed25519PrivateKey.from_private_bytes(self._seed)


def check(
    signature: Signature | None, record: str, namespace: str, trusted: Collection[str]
) -> None:
    """Returns if a trusted key signed this record for this namespace.

    Args:
        signature: what came with the record, or None.
        record: record digest, 64 hex characters.
        namespace: where the record was found.
        trusted: public keys, each 64 hex characters.

    Raises:
        UntrustedMemory: if it is not signed, or by a key that is not trusted, or if the
            signature is not that of this record and namespace.
        InvalidArgument: if a trusted key is none, or ``record`` is no digest.
        MissingDependency: if ``cryptography`` is not installed.
    """
    keys = _trusted(trusted)
    what = f"record {record} in namespace {namespace!r}"
    known = f"Trusted: {', '.join(keys) or 'no key'}"
    message = _message(record, namespace)
    if signature is None:
        raise UntrustedMemory(f"{what} is not signed. {known}. Sign it with one of these keys")
    if signature.key not in keys:
        raise UntrustedMemory(
            f"{what} is signed by {signature.key}, which is not trusted. {known}. Trust this key "
            "only if you know whose it is"
        )
    if not _verifies(signature, message):
        raise UntrustedMemory(
            f"{what} has a signature of {signature.key} that is not for it: it was made for "
            f"another record or namespace, or changed. {known}. Put the memory again and sign it"
        )


def _verifies(signature: Signature, message: bytes) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise _missing() from error
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key))
        public.verify(bytes.fromhex(signature.value), message)
    except (InvalidSignature, ValueError):  # ValueError: the key is no point of the curve
        return False
    return True


def _trusted(keys: Collection[str]) -> list[str]:
    if isinstance(keys, str):  # `in` would look for a piece of the text
        raise InvalidArgument("trusted is a collection of keys, found one text: use [key]")
    for key in keys:
        if not isinstance(key, str) or not _HEX.fullmatch(key):
            raise InvalidArgument(
                "a trusted key is a public key in 64 hex characters, found another "
                f"{type(key).__name__}"  # not repeated: it may be a secret key by mistake
            )
    return sorted({key.lower() for key in keys})


def _message(record: str, namespace: str) -> bytes:
    if not is_digest(record):
        raise InvalidArgument(f"a signature is over a record digest, found {_short(record)}")
    document = {"namespace": namespace, "record": record}
    return b"kvedit.signature.1\n" + canonical_json(document)


def _seed(data: bytes, where: str) -> bytes:
    """Returns the 32 bytes of a secret key in any of the forms that are read."""
    if not isinstance(data, bytes):
        raise InvalidArgument(f"a signing key is bytes, hex or a path, found {type(data).__name__}")
    if data.lstrip().startswith(b"-----BEGIN "):
        return _seed_from_text(data, where)
    if len(data) == _SEED:
        return data
    text = data.strip().decode("ascii", errors="replace")
    if not _HEX.fullmatch(text):
        raise InvalidArgument(
            f"{where} should be an Ed25519 secret key: {_SEED} bytes, {2 * _SEED} hex "
            f"characters, PEM, or the path of a file with one; it has {len(data)} bytes that are "
            "none of these"
        )
    return bytes.fromhex(text)


def _seed_from_text(data: bytes, where: str) -> bytes:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization as form
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise _missing() from error
    ssh = b"OPENSSH PRIVATE KEY" in data
    try:
        load = form.load_ssh_private_key if ssh else form.load_pem_private_key
        key = load(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: has a password
        raise InvalidArgument(
            f"{where} should be an Ed25519 secret key in PEM, without a password: {error}"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidArgument(f"{where} is a {type(key).__name__}; expected an Ed25519 secret key")
    return key.private_bytes_raw()


def _missing() -> MissingDependency:
    return MissingDependency("cryptography", "crypto", "A signed store")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
