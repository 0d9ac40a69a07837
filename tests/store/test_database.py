"""The index's file: processes that open it at once wait for each other."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

from kvedit.store.database import _use_wal


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)


def test_turning_to_wal_waits_for_another_connection(tmp_path):
    path = tmp_path / "index.sqlite"
    holder, other = _open(path), _open(path)
    holder.execute("CREATE TABLE part (name)")
    holder.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, holder.execute, ("COMMIT",))
    release.start()
    _use_wal(other)
    release.join()
    assert other.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    holder.close()
    other.close()


def test_many_that_turn_a_new_file_at_once_all_succeed(tmp_path):
    failed: list[str] = []

    def turn(path: Path, gate: threading.Barrier) -> None:
        connection = _open(path)
        gate.wait()
        try:
            _use_wal(connection)
        except sqlite3.Error as error:
            failed.append(str(error))
        connection.close()

    for number in range(100):
        path = tmp_path / f"{number}.sqlite"
        first = _open(path)
        first.execute("CREATE TABLE part (name)")
        first.close()
        gate = threading.Barrier(8)
        threads = [threading.Thread(target=turn, args=(path, gate)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
