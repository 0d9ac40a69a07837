"""The verbs of the store, on a tiny model: what they change, print, and refuse."""

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from kvedit.runs.cli import main
from kvedit.runs.verbs.options import CODECS
from kvedit.store import Signer, Store, codecs
from kvedit.store.recipes import RECIPE

TEXT = "The handbook of the shop. Refunds are possible within 60 days. Shipping takes three days."
MODEL = ("--model", "tiny:llama")


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs a verb in an empty folder; returns status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVEDIT_STORE", raising=False)
    monkeypatch.setenv("KVEDIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "handbook.txt").write_text(TEXT, encoding="utf-8")

    def call(*words):
        code = main(list(words))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def stored(run):
    """A store with ``handbook`` in two versions; the second is an edit."""
    assert run("capture", "handbook.txt", *MODEL, "--source", "wiki", "--tag", "raw")[0] == 0
    assert run("edit", "handbook", "--editor", "emphasize", "span=60 days", "strength=2")[0] == 0
    return run


def as_json(run, *words):
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, ""), err
    return json.loads(out)


def refused(run, *words):
    code, out, err = run(*words)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    return err


def records(run, name, *words):
    return [record["record"] for record in as_json(run, "log", name, *words)]


def damage(folder="memories"):
    """Flips a bit in the middle of the largest pack of a store."""
    path = max(Path(folder, "packs").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_labels_are_put_and_searched(run):
    labels = ("--tag", "a", "--source", "wiki", "--licence", "CC0", "--ttl", "7d")
    for name in ("one", "two", "three"):
        as_json(run, "capture", "handbook.txt", "--name", name, *MODEL, *labels)
    first = as_json(run, "show", "one")["record"]
    assert (first["tags"], first["source"], first["licence"]) == (["a"], "wiki", "CC0")
    assert first["expires"] > first["created"]
    as_json(run, "annotate", "one", "--metric", "kl=0.01", "--metric", "recall=0.9")
    as_json(run, "annotate", "two", "--metric", "kl=0.5", "--no-tags", "--ttl", "0")

    def names(*words):
        return [entry["name"] for entry in as_json(run, "ls", *words)]

    assert names("--where", "metric.kl < 0.1") == ["one"]
    assert names("t*", "--where", "source = wiki", "--tag", "a") == ["three"]
    assert names("--where", "tag = a", "--limit", "1", "--after", "one") == ["three"]
    assert as_json(run, "show", "two")["record"]["expires"] is None
    shown = run("ls", "--long")[1]
    assert all(part in shown for part in ("kl=0.01,recall=0.9", "CC0", "expires"))
    assert "licence: CC0" in run("show", "one")[1]
    assert "expected" in refused(run, "ls", "--where", "tag =")
    assert "--message" in refused(run, "annotate", "one")


def test_codecs(stored):
    assert set(CODECS) == {*codecs.CODECS, RECIPE}
    edited = as_json(
        stored, "edit", "handbook", "--as", "packed", "--codec", "planes-zstd",
        "--editor", "drop", "span=Shipping takes",
    )  # fmt: skip
    assert edited["codec"] == "planes-zstd"
    recipe = as_json(
        stored, "edit", "handbook", "--as", "steps", "--codec", "recipe",
        "--editor", "drop", "span=Shipping takes",
    )  # fmt: skip
    assert (recipe["codec"], recipe["content"]) == ("recipe", edited["content"])
    difference = as_json(stored, "diff", "packed", "steps")
    assert difference["identical"]
    assert (difference["blocks"]["only_a"], difference["blocks"]["only_b"]) == (0, 0)
    assert as_json(stored, "replay", "steps")["bit_equal"]
    words = ("edit", "handbook", "--as", "coarse", "--codec", "int2")
    words = (*words, "--editor", "shift", "offset=1")
    assert "force" in refused(stored, *words)
    assert as_json(stored, *words, "--force")["codec"] == "int2"


def test_names_are_moved(stored):
    second, first = records(stored, "handbook")
    assert as_json(stored, "tag", "handbook@{1}", "v1")["record"] == first
    assert as_json(stored, "branch", "handbook", "trial")["record"] == second
    assert "tag" in refused(stored, "edit", "v1", "--editor", "shift", "offset=1")
    assert "trial" in refused(stored, "branch", "handbook", "trial")
    assert as_json(stored, "rollback", "handbook")["record"] == first
    assert as_json(stored, "rollback", "handbook", "--to", second[:12])["record"] == second
    assert as_json(stored, "rollback", "handbook", "--to", "3")["record"] == first
    assert records(stored, "handbook") == [first, second, first, second, first]
    refused(stored, "rollback", "handbook", "--to", "9")
    stored("pin", "trial")
    assert "pinned" in stored("ls", "trial")[1]
    stored("unpin", "trial")
    assert "pinned" not in stored("ls", "trial")[1]
    refused(stored, "pin", "nobody")


def test_lineage_and_families(stored):
    log = as_json(stored, "log", "handbook", "--lineage")
    assert [len(version["lineage"]) for version in log] == [2, 1]
    assert set(log[1]["lineage"]) < set(log[0]["lineage"])
    assert " emphasize " in stored("log", "handbook", "--lineage")[1]
    second, first = records(stored, "handbook")
    assert [r["record"] for r in as_json(stored, "ancestors", "handbook")] == [first]
    assert [r["record"] for r in as_json(stored, "descendants", first)] == [second]
    assert {r["record"] for r in as_json(stored, "descendants", "wiki")} == {first, second}
    assert as_json(stored, "descendants", "handbook") == []
    assert "nothing stored" in stored("ancestors", "handbook@{1}")[1]


def test_replay(stored):
    pure = as_json(stored, "replay", "handbook")
    assert (pure["bit_equal"], pure["reproducibility"], pure["weakest"]) == (True, "pure", "reader")
    assert "--from-scratch" in refused(stored, "replay", "handbook@{1}")
    for words in (("handbook", "--from-scratch"), ("handbook@{1}", *MODEL)):
        again = as_json(stored, "replay", *words)
        assert again["digest_equal"] and again["bit_equal"], words
    refused(stored, "replay", "handbook@{1}", "--model", "tiny:qwen3")
    assert "bit-equal: yes" in stored("replay", "handbook")[1]


def test_diff_says_which_slots_and_what_they_do(stored, tmp_path):
    plain = as_json(stored, "diff", "handbook@{1}", "handbook")
    assert "slots" not in plain and "behaviour" not in plain
    assert plain["blocks"]["only_a"] == 0 < plain["blocks"]["only_b"]
    assert plain["blocks"]["shared"] > 0
    (tmp_path / "probes.txt").write_text("And then?\n\nWhy?\n", encoding="utf-8")
    found = as_json(
        stored, "diff", "handbook@{1}", "handbook", "--slots", "3",
        "--probe", "How long?", "--probes", "probes.txt", "--max-new-tokens", "2",
    )  # fmt: skip
    assert len(found["slots"]) == 3 < found["changed_slots"]
    assert {slot["bias"] for slot in found["slots"]} == {2.0}
    assert all(slot["text"] and slot["text"] in TEXT for slot in found["slots"])
    assert found["behaviour"]["n"] == 3
    assert found["behaviour"]["kl"] > 0
    same = as_json(stored, "diff", "handbook", "handbook", "--slots", "--probe", "How long?")
    assert (same["changed_slots"], same["slots"], same["behaviour"]["kl"]) == (0, [], 0.0)
    shown = stored("diff", "handbook@{1}", "handbook", "--slots", "--probe", "How long?")[1]
    assert all(part in shown for part in ("shared", "slots changed", "KL", "only in b:"))
    assert "--probe" in refused(stored, "diff", "handbook", "handbook", *MODEL)
    assert "nowhere" in refused(stored, "diff", "handbook", "handbook", "--probes", "nowhere")


def test_upkeep(stored):
    before = as_json(stored, "du")
    assert [one["name"] for one in before["names"]] == ["handbook"]
    assert before["garbage"] == 0
    stats = as_json(stored, "stats")
    assert (stats["names"], stats["packs"]) == (1, 2)
    assert as_json(stored, "fsck")["ok"]
    stored("rm", "handbook")
    collected = as_json(stored, "gc")
    assert (collected["packs"], as_json(stored, "stats")["packs"]) == (2, 0)
    refused(stored, "gc", "--waste", "2")


def test_fsck_fails_where_something_is_damaged_and_repairs_from_another(stored):
    for back in (1, 0):
        stored("export", f"handbook@{{{back}}}", f"{back}.kv")
        stored("import", f"{back}.kv", "--store", "backup")
    before = records(stored, "handbook")
    damage()
    code, out, err = stored("fsck", "--json")
    assert (code, err) == (1, "")
    assert not json.loads(out)["ok"]
    assert "nowhere" in refused(stored, "fsck", "--from", "nowhere")
    assert as_json(stored, "fsck", "--repair", "--from", "backup")["ok"]
    assert as_json(stored, "fsck")["problems"] == []
    assert records(stored, "handbook") == before
    assert as_json(stored, "replay", "handbook")["bit_equal"]


def test_a_file_carries_a_memory(stored):
    done = as_json(stored, "export", "handbook", "file.kv")
    assert done["bytes"] == Path("file.kv").stat().st_size
    assert "exists" in refused(stored, "export", "handbook", "file.kv")
    there = as_json(stored, "import", "file.kv", "--store", "other", "--record", done["record"])
    assert (there["name"], there["record"]) == ("handbook", done["record"])
    moved = as_json(stored, "import", "file.kv", "--store", "other", "--name", "theirs")
    assert moved["name"] == "theirs"
    refused(stored, "import", "file.kv", "--store", "other", "--record", "0" * 64)


@pytest.fixture
def key(tmp_path):
    pytest.importorskip("cryptography")

    def make(name):
        path = tmp_path / name
        path.write_text(secrets.token_hex(32))
        path.chmod(0o600)
        return str(path)

    return make


def test_keys_and_namespaces(run, key):
    closed = ("--store", "closed", "--key-file", key("key"))
    as_json(run, "capture", "handbook.txt", *MODEL, *closed)
    record = as_json(run, "show", "handbook", *closed)["record"]["record"]
    refused(run, "show", "handbook", "--store", "closed")
    refused(run, "show", "handbook", "--store", "closed", "--key-file", key("wrong"))
    refused(run, "export", "handbook", "plain.kv", *closed)
    assert as_json(run, "export", "handbook", "plain.kv", "--plain", *closed)["record"] == record
    file_key = key("file-key")
    run("export", "handbook", "sealed.kv", "--file-key", file_key, *closed)
    refused(run, "import", "sealed.kv", "--store", "open")
    there = as_json(run, "import", "sealed.kv", "--store", "open", "--file-key", file_key)
    assert there["record"] == record
    tenant = ("--store", "open", "--namespace", "tenant")
    assert as_json(run, "ls", *tenant) == []
    as_json(run, "import", "plain.kv", "--name", "mine", *tenant)
    assert [entry["name"] for entry in as_json(run, "ls", *tenant)] == ["mine"]
    assert [entry["name"] for entry in as_json(run, "ls", "--store", "open")] == ["handbook"]


def test_only_what_is_trusted_is_read(stored, key):
    signer, other = Signer.generate(), Signer.generate()
    memory = Store("memories").get("handbook")
    Store("signed", signer=signer).put(memory, "handbook")
    words = ("show", "handbook", "--store", "signed", "--trusted")
    shown = as_json(stored, *words, other.public, "--trusted", signer.public)
    assert shown["record"]["signed_by"] == signer.public
    refused(stored, *words, other.public)


def test_a_remote_below_and_a_store_at_a_url(stored, tmp_path):
    pytest.importorskip("obstore")
    url = (tmp_path / "remote").as_uri()
    below = ("--remote", url)
    assert as_json(stored, "push", *below)["packs"] == 2
    assert as_json(stored, "push", "handbook", *below)["packs"] == 0
    there = ("--store", "second", *below)
    assert as_json(stored, "pull", "handbook", "--lazy", *there) == {"names": ["handbook"]}
    assert as_json(stored, "stats", *there)["local"] == 0
    assert as_json(stored, "replay", "handbook", *there)["bit_equal"]
    as_json(stored, "edit", "handbook", "--editor", "shift", "offset=1", *there)
    assert as_json(stored, "sync", *below) == {"packs": 0, "names": ["handbook"]}
    assert len(records(stored, "handbook")) == 3
    assert as_json(stored, "evict", "1GiB", *below)["bytes"] > 0
    assert as_json(stored, "stats")["local"] == 0
    at = ("--store", url)
    assert records(stored, "handbook", *at) == records(stored, "handbook")
    assert as_json(stored, "ask", "handbook", "So?", "--max-new-tokens", "2", *at)["replies"]
    assert as_json(stored, "rm", "handbook", *at)["removed"][0]["versions"] == 3
    assert as_json(stored, "ls", *at) == []
    assert "--remote" in refused(stored, "evict", "1GiB")
    assert "remote" in refused(stored, "push")
    assert "--endpoint" in refused(stored, "ls", "--endpoint", "http://localhost:1")


def test_capacity_is_kept(stored):
    assert "10GiB" in refused(stored, "ls", "--capacity", "lots")
    before = records(stored, "handbook")
    words = ("edit", "handbook", "--editor", "shift", "offset=1", "--capacity", "1KiB")
    refused(stored, *words)
    assert records(stored, "handbook") == before


@pytest.mark.parametrize(
    "words",
    [
        ("capture", "a", "--ttl", "soon"),
        ("capture", "a", "--codec", "zip"),
        ("ls", "--limit", "0"),
        ("annotate", "a", "--metric", "kl"),
        ("annotate", "a", "--metric", "kl=low"),
        ("annotate", "a", "--tag", "x", "--no-tags"),
        ("evict",),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_two(run, capsys, words):
    with pytest.raises(SystemExit) as error:
        run(*words)
    assert error.value.code == 2
    assert capsys.readouterr().out == ""


LIGHT = """
import sys
from kvedit.runs.cli import main
for words in (["ls", "--where", "tag = raw", "--long"], ["log", "handbook", "--lineage"],
              ["tag", "handbook", "t"], ["branch", "handbook", "b"], ["rollback", "b", "--to", "0"],
              ["annotate", "b", "--tag", "x"], ["pin", "b"], ["unpin", "b"], ["du"], ["stats"],
              ["export", "b", "b.kv"], ["import", "b.kv", "--store", "other"], ["gc"], ["fsck"],
              ["ancestors", "b"], ["descendants", "wiki"], ["replay", "handbook"],
              ["diff", "handbook@{1}", "handbook", "--slots"]):
    assert main(words) == 0, words
loaded = {"transformers", "wandb", "hydra", "matplotlib", "obstore"} & set(sys.modules)
sys.exit(f"loaded: {loaded}" if loaded else 0)
"""


def test_the_verbs_of_the_store_load_no_model_library(stored):
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
