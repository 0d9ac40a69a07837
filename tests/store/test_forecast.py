"""What loading will cost beside a prefill, by the speeds that were seen."""

import warnings

import pytest

from kvedit.errors import InvalidArgument
from kvedit.store import Store

from .conftest import build_memory


def test_by_what_was_seen(tmp_path):
    (tmp_path / "r").mkdir()
    store = Store(tmp_path / "s", "process", remote=f"file://{tmp_path / 'r'}")
    memory = build_memory(1, slots=600)
    store.put(memory, "m")
    assert store.forecast("m", 100.0).load is None  # nothing was read yet
    store.get("m")
    found = store.forecast("m", 100.0)
    counters = store.counters
    rate = counters.bytes_read * 1e9 / counters.read_ns
    assert found.prefill == 6.0 and found.below == 0
    assert found.load == pytest.approx(found.local / rate)
    assert not found.recompute and "load it" in str(found)
    assert store.forecast("m", 1e12).recompute
    store.evict("1GiB")
    assert store.forecast("m", 100.0).load is None  # the remote was never read
    store.get("m")
    store.evict("1GiB")
    far = store.forecast("m", 100.0)
    assert far.local == 0 and far.below > memory.nbytes and far.load > found.load


def test_get_says_it(store):
    store.put(build_memory(1), "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.get("m", prefill=1e12)  # no speed is known
        store.get("m", prefill=1.0)
    with pytest.warns(RuntimeWarning, match="compute it again"):
        store.get("m", prefill=1e12)
    for bad in (0, -1, float("nan")):
        with pytest.raises(InvalidArgument):
            store.get("m", prefill=bad)
    store.put(build_memory(2, source=None), "made")
    with pytest.raises(InvalidArgument, match="no tokens"):
        store.forecast("made", 10.0)
