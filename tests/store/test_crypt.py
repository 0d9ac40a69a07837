"""Cipher: sealed bytes open in their place only, checked against the primitives themselves."""

import json
import os
import re
import sys

import pytest
import torch

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from kvedit.errors import CorruptMemory, InvalidArgument, MissingDependency
from kvedit.memory.digest import tensor_bytes
from kvedit.store.crypt import OVERHEAD, Cipher

KEY = bytes(range(32))
A, B = "a" * 64, "b" * 64


@pytest.fixture
def cipher():
    return Cipher.from_key(KEY, "tenant")


def derived(key, namespace):
    info = b"kvedit.store.1\0" + namespace.encode()
    return HKDF(SHA256(), 32, None, info).derive(key)


@given(st.binary(max_size=200), st.text(max_size=8).filter(lambda t: t.isprintable()))
def test_oracle(data, namespace):
    place = {"digest": A, "namespace": namespace, "role": "block"}
    aad = json.dumps(place, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    cipher, plain = Cipher.from_key(KEY, namespace), AESGCM(derived(KEY, namespace))
    sealed = cipher.seal(data, A, "block")
    assert len(sealed) == len(data) + OVERHEAD
    assert plain.decrypt(sealed[:12], sealed[12:], aad) == data
    ours = b"n" * 12 + plain.encrypt(b"n" * 12, data, aad)
    assert cipher.open(ours, A, "block") == cipher.open(sealed, A, "block") == data


def test_bound_to_its_place(cipher):
    sealed = cipher.seal(b"some bytes", A, "block")
    refused = [
        (cipher, B, "block"),  # swapped for another block of the namespace
        (cipher, A, "manifest"),
        (Cipher.from_key(KEY, "other"), A, "block"),
        (Cipher.from_key(KEY[::-1], "tenant"), A, "block"),
        (Cipher("other", derived(KEY, "tenant")), A, "block"),  # the key alone does not do
    ]
    for other, digest, role in refused:
        with pytest.raises(CorruptMemory, match=r"another key, or its 38 bytes were changed"):
            other.open(sealed, digest, role)
    assert cipher.open(sealed, A, "block") == b"some bytes"


def test_every_damage(cipher):
    sealed = cipher.seal(b"some bytes", A, "block")
    flips = [
        sealed[:at] + bytes([sealed[at] ^ 1 << bit]) + sealed[at + 1 :]
        for at in range(len(sealed))
        for bit in range(8)
    ]
    cuts = [sealed[:at] for at in range(len(sealed))] + [sealed[1:], sealed + b"\0"]
    for damaged in flips + cuts:
        with pytest.raises(CorruptMemory):
            cipher.open(damaged, A, "block")


def test_nonces_differ(cipher):
    sealed = {cipher.seal(b"same", A, "block") for _ in range(500)}
    assert len({data[:12] for data in sealed}) == 500


def test_views(cipher):
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    for data in (tensor_bytes(tensor), memoryview(tensor.numpy()), bytearray(tensor.numpy())):
        sealed = memoryview(bytearray(cipher.seal(data, A, "block")))
        assert cipher.open(sealed, A, "block") == tensor.numpy().tobytes()
    empty = memoryview(torch.zeros(0, 3).numpy())
    assert cipher.open(cipher.seal(empty, A, "block"), A, "block") == b""


def test_fingerprint(cipher):
    others = [Cipher.from_key(KEY, "x"), Cipher.from_key(KEY[::-1], "tenant")]
    prints = {c.fingerprint for c in (cipher, *others)}
    assert len(prints) == 3
    assert all(re.fullmatch("[0-9a-f]{16}", p) for p in prints)
    assert Cipher.from_key(KEY, "tenant").fingerprint == cipher.fingerprint
    assert cipher.fingerprint not in derived(KEY, "tenant").hex()


def test_key_forms(cipher, tmp_path):
    raw, text = tmp_path / "raw", tmp_path / "hex"
    raw.write_bytes(KEY)
    text.write_text(f"{KEY.hex().upper()}\n")
    for path in (raw, text):
        path.chmod(0o600)
    for key in (KEY, KEY.hex(), raw, text, str(text)):
        assert Cipher.from_key(key, "tenant") == cipher


@pytest.mark.parametrize(
    "key", [KEY[:31], KEY + b"x", KEY.hex()[:-1], KEY.hex() + "\n", "x\0", "x" * 5000, None]
)
def test_bad_keys_are_not_repeated(key):
    with pytest.raises(InvalidArgument, match="32 bytes, 64 hex") as caught:
        Cipher.from_key(key, "tenant")
    assert key is None or str(key)[:20] not in str(caught.value)


@pytest.mark.parametrize("data", [b"", KEY[:16], KEY + b"\n", b"0f" * 16, b"\xff" * 64])
def test_bad_files(tmp_path, data):
    path = tmp_path / "key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(InvalidArgument, match="should hold a key"):
        Cipher.from_key(path, "tenant")


@pytest.mark.skipif(os.name != "posix", reason="no such permissions")
def test_a_file_that_others_read(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(KEY)
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(InvalidArgument, match=f"mode {mode:o}.*chmod 600"):
            Cipher.from_key(path, "tenant")
    path.chmod(0o400)
    assert Cipher.from_key(path, "tenant").namespace == "tenant"
    with pytest.raises(InvalidArgument, match="no such file"):
        Cipher.from_key(tmp_path, "tenant")


def test_no_key_in_repr_or_message(cipher):
    with pytest.raises(CorruptMemory) as caught:
        cipher.open(b"short", A, "block")
    secrets = (KEY, derived(KEY, "tenant"))
    for text in (repr(cipher), str(cipher), str(caught.value)):
        assert all(s.hex()[:8] not in text and repr(s)[2:20] not in text for s in secrets)
    assert cipher.fingerprint in str(caught.value)


def test_no_short_cipher_and_no_bad_namespace():
    with pytest.raises(InvalidArgument, match="found 16"):
        Cipher("tenant", KEY[:16])
    with pytest.raises(InvalidArgument, match="Unicode"):
        Cipher.from_key(KEY, "\ud800")


def test_missing(cipher, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.hashes", None)
    for call in (lambda: Cipher.from_key(KEY, "x"), lambda: cipher.seal(b"", A, "block")):
        with pytest.raises(MissingDependency, match=r"kvedit\[crypto\]"):
            call()
