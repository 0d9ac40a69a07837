"""Signer, Signature, check: against an independent verification."""

import dataclasses
import json
import os
import stat
import sys

import pytest

pytest.importorskip("cryptography")
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from kvedit.errors import InvalidArgument, KVEditError, MissingDependency, UntrustedMemory
from kvedit.store.sign import Signature, Signer, check

SEED = bytes(range(32))
RECORD, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def signer():
    return Signer.from_key(SEED)


def pem(key, kind=form.PrivateFormat.PKCS8, lock=None):
    lock = lock or form.NoEncryption()
    return key.private_bytes(form.Encoding.PEM, kind, lock)


def private(path, data):
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def test_independent(signer):
    signature = signer.sign(RECORD, "tenant é")
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key))
    document = {"namespace": "tenant é", "record": RECORD}
    message = b"kvedit.signature.1\n" + json.dumps(
        document, separators=(",", ":"), ensure_ascii=False
    ).encode("utf-8")
    public.verify(bytes.fromhex(signature.value), message)
    with pytest.raises(InvalidSignature):
        public.verify(bytes.fromhex(signature.value), message + b" ")
    made = Ed25519PrivateKey.from_private_bytes(SEED).sign(message).hex()
    check(Signature(signer.public, made), RECORD, "tenant é", [signer.public])
    assert made == signature.value


def test_known_key():
    # RFC 8032, section 7.1, test 1
    seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert Signer.from_key(seed).public == public


def test_trusted(signer):
    signature, other = signer.sign(RECORD, "n"), Signer.generate().public
    for trusted in ([signer.public], {other, signer.public}, (signer.public.upper(),)):
        assert check(signature, RECORD, "n", trusted) is None


def test_untrusted(signer):
    signature, other = signer.sign(RECORD, "n"), Signer.generate()
    cases = [
        (None, RECORD, "n", [signer.public], "is not signed"),
        (signature, RECORD, "n", [other.public], f"signed by {signer.public}, which is not"),
        (signature, RECORD, "n", [], "Trusted: no key"),
        (signature, OTHER, "n", [signer.public], "not for it"),
        (signature, RECORD, "m", [signer.public], "not for it"),
        (Signature(other.public, signature.value), RECORD, "n", [other.public], "not for it"),
    ]
    for *arguments, match in cases:
        with pytest.raises(UntrustedMemory, match=match) as caught:
            check(*arguments)
        assert arguments[1] in str(caught.value)
        assert all(key in str(caught.value) for key in arguments[3])
    assert issubclass(UntrustedMemory, KVEditError)


def test_every_bit(signer):
    signature = signer.sign(RECORD, "n")
    value = bytes.fromhex(signature.value)
    for at in range(64):
        for bit in range(8):
            flipped = value[:at] + bytes([value[at] ^ 1 << bit]) + value[at + 1 :]
            with pytest.raises(UntrustedMemory):
                check(Signature(signer.public, flipped.hex()), RECORD, "n", [signer.public])


def test_a_trusted_key_that_is_no_point(signer):
    key = "ff" * 32
    with pytest.raises(UntrustedMemory):
        check(Signature(key, signer.sign(RECORD, "n").value), RECORD, "n", [key])


def test_trusted_must_be_keys(signer):
    signature = signer.sign(RECORD, "n")
    with pytest.raises(InvalidArgument, match=r"found one text: use \[key\]"):
        check(signature, RECORD, "n", signer.public)
    for trusted in ([signer.public[:-1]], [b"x"], ["-----BEGIN PRIVATE KEY"]):
        with pytest.raises(InvalidArgument, match="a trusted key is") as caught:
            check(signature, RECORD, "n", trusted)
        assert "BEGIN" not in str(caught.value)
    for call in (lambda: signer.sign("x", "n"), lambda: check(None, "x", "n", [])):
        with pytest.raises(InvalidArgument, match="record digest"):
            call()


def test_json(signer):
    signature = signer.sign(RECORD, "n")
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature
    good = signature.to_json()
    bad = [None, [], "x", {}, {**good, "more": 1}, {"key": good["key"]}, {**good, "key": 1}]
    bad += [{**good, "key": good["key"].upper()}, {**good, "value": good["value"][:-1]}]
    bad += [{**good, "value": good["value"] + "\n"}, {**good, "value": "g" * 128}]
    for data in bad:
        with pytest.raises(ValueError, match="signature"):
            Signature.from_json(data)


def test_key_forms(signer, tmp_path):
    key = Ed25519PrivateKey.from_private_bytes(SEED)
    ssh = pem(key, form.PrivateFormat.OpenSSH)
    forms = [SEED, SEED.hex().encode() + b"\n", pem(key), ssh]
    paths = [private(tmp_path / str(i), data) for i, data in enumerate(forms)]
    for found in [*forms, SEED.hex(), *paths, str(paths[2])]:
        assert Signer.from_key(found) == signer


def test_bad_keys(tmp_path):
    key = Ed25519PrivateKey.from_private_bytes(SEED)
    locked = pem(key, lock=form.BestAvailableEncryption(b"x"))
    public = key.public_key().public_bytes(
        form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
    )
    cut = pem(key)[:60]
    for data in (b"", SEED[:31], locked, public, pem(X25519PrivateKey.generate()), cut):
        for found in (data, private(tmp_path / "key", data)):
            with pytest.raises(InvalidArgument, match="Ed25519"):
                Signer.from_key(found)
    for found in (None, 7, "x" * 5000, "\0"):
        with pytest.raises(InvalidArgument, match="key"):
            Signer.from_key(found)


@pytest.mark.skipif(os.name != "posix", reason="no such permissions")
def test_files_are_private(signer, tmp_path):
    path = tmp_path / "key.pem"
    signer.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Signer.from_key(path) == signer
    with pytest.raises(FileExistsError):
        Signer.generate().save(path)
    path.chmod(0o644)
    with pytest.raises(InvalidArgument, match="chmod 600"):
        Signer.from_key(path)


def test_secret_stays(signer):
    assert SEED.hex()[:8] not in repr(signer) and repr(SEED)[2:20] not in repr(signer)
    assert signer.public in repr(signer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        signer.public = "x"
    assert Signer.generate() != Signer.generate()


def test_missing(signer, monkeypatch):
    signature = signer.sign(RECORD, "n")
    module = "cryptography.hazmat.primitives.asymmetric.ed25519"
    monkeypatch.setitem(sys.modules, module, None)
    for call in (Signer.generate, lambda: check(signature, RECORD, "n", [signer.public])):
        with pytest.raises(MissingDependency, match=r"kvedit\[crypto\]"):
            call()
