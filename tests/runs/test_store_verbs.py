"""The verbs that look after a store, through the command line."""

import json

import pytest

from kvedit.runs.cli import main
from kvedit.store import Store


@pytest.fixture
def run(tmp_path, capsys):
    place = str(tmp_path / "store")

    def call(*words, code=0):
        assert main([*words, "--store", place, "--json"]) == code, capsys.readouterr().err
        out = capsys.readouterr().out
        return json.loads(out) if out.strip() else None

    text = tmp_path / "text.txt"
    text.write_text("Refunds are possible within 30 days. Ask the desk.")
    labels = ("--tag", "x", "--source", "book")
    call("capture", str(text), "--name", "h", "--model", "tiny:llama", *labels)
    suppress = ("--editor", "suppress", "strength=1.0")
    call("edit", "h", *suppress, "span=30 days", "--as", "e")
    call.place = place
    return call


def test_names(run):
    assert run("branch", "h", "b")["name"] == "b"
    assert run("tag", "h", "v1")["version"] == 1
    run("edit", "b", "--editor", "suppress", "strength=1.0", "span=desk")
    assert run("rollback", "b")["version"] == 3
    assert run("annotate", "h", "--metric", "kl=0.01", "--tag", "y")["metrics"] == {"kl": 0.01}
    assert [e["name"] for e in run("ls", "--where", "metric.kl < 0.1")] == ["h"]
    assert [e["name"] for e in run("ls", "--limit", "1", "--after", "b")] == ["e"]
    run("pin", "h")
    assert run("ls", "h")[0]["pinned"]
    run("unpin", "h")
    run("annotate", "h", "--metric", "kl=much", code=1)


def test_family(run):
    assert {r["name"] for r in run("descendants", "book")} == {"h", "e"}
    assert [r["name"] for r in run("ancestors", "e")] == ["h"]
    assert run("replay", "e")["bit_equal"]
    assert run("replay", "e", "--from-scratch")["bit_equal"]


def test_upkeep(run, tmp_path):
    assert run("fsck")["lost"] == []
    assert run("du")["garbage"] == 0
    run("export", "e", str(tmp_path / "e.kv"))
    run("rm", "e")
    assert run("gc", "--waste", "0")["freed"] > 0
    assert run("import", str(tmp_path / "e.kv"))["name"] == "e"
    assert run("stats")["names"] == 2
    (path,) = {
        Store(run.place).path / "packs" / f"{p}.safetensors"
        for p in Store(run.place).show("e").packs[:1]
    }
    path.unlink()
    assert run("fsck", code=1)["lost"]


def test_remote(run, tmp_path):
    (tmp_path / "remote").mkdir()
    remote = ("--remote", f"file://{tmp_path / 'remote'}")
    assert run("push", *remote)["packs"] >= 2
    assert run("evict", "1GiB", *remote)["bytes"] > 0
    assert run("fsck", *remote)["lost"] == []
    assert run("sync", *remote) == {"packs": 0, "names": []}
    assert run("pull", "--lazy", *remote) == {"names": []}
    assert run("show", "h", *remote)["record"]["name"] == "h"
    other = str(tmp_path / "other")
    assert main(["pull", *remote, "--store", other]) == 0
    assert len(Store(other)) == 2
