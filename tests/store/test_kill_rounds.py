"""SIGKILL at random moments of put, gc, evict and push: nothing acknowledged is lost."""

import os

import pytest

from kvedit.testing.killing import kill_round

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize("durability", ["process", "full"])
def test_kill_rounds(tmp_path, durability):
    acknowledged = reads = 0
    for seed in range(17 if durability == "process" else 3):
        found = kill_round(tmp_path / str(seed), seed, durability)
        assert found.ok, found
        acknowledged += found.acknowledged
        reads += found.reads
    assert acknowledged > 20 and reads > 20  # the rounds did something
