"""kvedit bench store: every row is there, in sane numbers; times are not judged."""

import json

from kvedit.runs.cli import main


def report(capsys, *words):
    assert main(["bench", "store", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_small_run(capsys, tmp_path):
    out = tmp_path / "report.json"
    words = ("--size", "1MiB", "--pairs", "2", "--model", "tiny:llama", "--out", str(out))
    found = report(capsys, *words)
    rows = {row["name"]: row for row in found["rows"]}
    assert {"put, durable", "get off, then every byte", "get full", "get deep", "fsck"} <= set(rows)
    for row in rows.values():
        assert 0 < row["p50"] <= row["p99"]
    for name in ("put, durable", "get full", "get deep"):
        low, high = rows[name]["spread"]
        assert 0 < low <= rows[name]["ratio"] <= high
    assert rows["get off, then every byte"]["verified"] == 0 and rows["get deep"]["verified"] == 1
    assert "Loading wins from" in found["notes"][0]
    assert json.loads(out.read_text()) == found


def test_many(capsys):
    found = report(capsys, "--memories", "60")
    assert found["rows"][0]["name"] == "put, 60 there"
    assert main(["bench", "store", "--memories", "60"]) == 0
    assert "| open |" in capsys.readouterr().out
