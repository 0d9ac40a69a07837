"""SIGKILL at random moments of every verb that writes: nothing acknowledged is lost."""

import os
from collections import Counter

import pytest

from kvedit.testing.killing import kill_rounds

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize(("durability", "rounds"), [("process", 20), ("full", 5)])
def test_kill_rounds(tmp_path, durability, rounds):
    jobs, killed, checked, reads = Counter(), Counter(), 0, 0
    for found in kill_rounds(tmp_path, range(rounds), durability):
        assert found.ok, found
        jobs += found.jobs
        killed += found.killed
        checked += found.checked
        reads += found.reads
    assert checked > rounds and reads > rounds  # the rounds did something
    assert {"put", "put_many", "gc", "push", "evict", "rm", "branch"} <= jobs.keys()
    assert len(killed) > 5, killed  # not always at the same place
