"""doctor finds what is there, names what is missing, and notices a damaged store."""

import json

import pytest
from packaging.specifiers import SpecifierSet

from kvedit.runs import doctor
from kvedit.runs.cli import main

MODEL = "tiny:llama"


@pytest.fixture
def store(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Nothing is lost, and a torn byte is seen.")
    assert main(["capture", "text.txt", "--model", MODEL, "--store", "s"]) == 0
    capsys.readouterr()
    return tmp_path / "s"


def test_this_installation_is_healthy(store, capsys):
    code = main(["doctor", "--store", "s", "--json"])
    found = json.loads(capsys.readouterr().out)
    by_subject = {finding["subject"]: finding for finding in found["findings"]}
    assert (code, found["healthy"]) == (0, True)
    assert {"python", "torch", "transformers", "threads", "devices", "cache folder"} <= {
        *by_subject
    }
    assert any(subject.startswith("extra ") for subject in by_subject)
    assert "1 versions, every byte" in by_subject["store"]["text"]


def test_a_flipped_byte_is_found(store, capsys):
    (pack,) = (path for path in store.rglob("packs/**/*") if path.is_file())
    data = bytearray(pack.read_bytes())
    data[-5] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    assert main(["doctor", "--store", "s"]) == 1
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("BAD"))
    assert "text v1" in line


def test_a_missing_store_is_said(tmp_path, capsys):
    assert main(["doctor", "--store", str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().out


def test_ranges_are_judged():
    wanted = SpecifierSet(">=2,<3")
    assert doctor._in_range("thing", "2.5", wanted).ok
    assert not doctor._in_range("thing", "3.0", wanted).ok
    missing = doctor._in_range("thing", None, wanted)
    assert not missing.ok
    assert "pip install" in missing.text


def test_an_absent_extra_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    extras = [finding for finding in doctor.examine() if finding.subject == "extra plots"]
    assert [finding.ok for finding in extras] == [False]
    assert "pip install 'kvedit[plots]'" in extras[0].text
    assert not extras[0].required
