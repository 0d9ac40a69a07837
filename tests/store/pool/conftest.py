"""One Mooncake master for the folder; skipped, with the reason, where it can't run."""

import pytest

from kvedit.store.pool import MooncakeConfig, MooncakePool
from kvedit.testing.mooncake import mooncake_master
from kvedit.testing.servers import ServerUnavailable

MIB = 1 << 20


@pytest.fixture(scope="session")
def master(tmp_path_factory):
    try:
        with mooncake_master(tmp_path_factory.mktemp("mooncake")) as running:
            yield running
    except ServerUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def fragile(tmp_path):
    """A master for a test that kills it."""
    try:
        with mooncake_master(tmp_path) as running:
            yield running
    except ServerUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def join():
    """``join(master, namespace="…", **config)`` opens a pool that is closed at the end."""
    opened = []

    def open_pool(master, namespace="test", **changes):
        config = {"segment_bytes": 64 * MIB, "buffer_bytes": 16 * MIB, "value_bytes": MIB}
        pool = MooncakePool(
            MooncakeConfig(master=master.address, **{**config, **changes}), namespace
        )
        opened.append(pool)
        return pool

    yield open_pool
    for pool in opened:
        pool.close()


@pytest.fixture(scope="session")
def shared(master):
    """A pool that several tests use, each with its own keys."""
    config = MooncakeConfig(master.address, segment_bytes=64 * MIB, value_bytes=MIB)
    with MooncakePool(config, "shared") as pool:
        yield pool
