"""A file is whole, or it is what it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvedit.memory.files import write_atomically


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_replaced_whole(tmp_path: Path, sync: bool) -> None:
    place = tmp_path / "new" / ("n" * 240)
    write_atomically(place, b"one", sync=sync)
    write_atomically(place, b"two", sync=sync)
    assert place.read_bytes() == b"two" and list(place.parent.iterdir()) == [place]


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "file"
    write_atomically(place, b"one")

    def full(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("kvedit.memory.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(place, b"two", sync=True)
    assert place.read_bytes() == b"one" and list(tmp_path.iterdir()) == [place]
