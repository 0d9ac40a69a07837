"""What is put into a remote store: bytes, or a file that may go away meanwhile."""

from __future__ import annotations

import pytest

from kvedit.errors import InvalidArgument
from kvedit.store.remote.payload import open_payload


def test_a_file_is_read_and_an_empty_one_is_empty(tmp_path):
    for content in (b"pack", b""):
        path = tmp_path / "pack"
        path.write_bytes(content)
        with open_payload(path) as view:
            assert bytes(view) == content


def test_a_file_that_is_gone_is_told_from_what_is_no_file(tmp_path):
    # A push tries again after the former: garbage was collected while it was sending.
    with pytest.raises(FileNotFoundError), open_payload(tmp_path / "gone"):
        pass
    with pytest.raises(InvalidArgument, match="is no file"), open_payload(tmp_path):
        pass
