"""A store that follows a remote one has nothing of its own; labels travel with pushes."""

import pytest

from kvedit.errors import RaceLost
from kvedit.store import Store

from .conftest import assert_same, small


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """Two stores of one remote store, as on two machines."""
    (tmp_path / "remote").mkdir()
    made = []
    for machine in ("one", "two"):
        monkeypatch.setenv("KVEDIT_CACHE", str(tmp_path / machine))
        made.append(Store(f"file://{tmp_path / 'remote'}", "process"))
    return made


def test_a_followed_store_has_nothing_of_its_own(machines):
    one, two = machines
    one.put(small(1), "m")
    one.put(small(2), "m")
    one.branch("m@{1}", "b")
    one.tag("m", "v1")
    one.rollback("m")
    one.annotate("m", metrics={"kl": 0.5})
    assert two.names() == ["b", "m", "v1"]
    assert_same(two.get("b"), small(1))
    assert_same(two.get("m"), small(1))
    assert two.log("m")[0].version == 3
    with pytest.raises(RaceLost):
        two.branch("m", "b")
    one.rm("b")
    assert "b" not in two and two.names() == ["m", "v1"]


def test_labels_travel_with_the_next_push(tmp_path):
    (tmp_path / "remote").mkdir()
    remote = f"file://{tmp_path / 'remote'}"
    one = Store(tmp_path / "one", "process", remote=remote, write="back")
    one.put(small(1), "m")
    one.flush()
    one.annotate("m", metrics={"kl": 0.5})
    one.flush()
    two = Store(tmp_path / "two", "process", remote=remote)
    two.pull()
    assert two.log("m")[0].metrics == {"kl": 0.5}
    one.annotate("m", tags=["x"])
    one.rm("m")
    one.flush()
    two.pull()
    assert "m" not in two
