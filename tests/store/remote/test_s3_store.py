"""A store over a real S3 server: the contract, push and pull, races, a server that dies."""

import multiprocessing
import threading
import warnings

import pytest

from kvedit.errors import CorruptMemory, NotFound, RaceLost, TierUnavailable
from kvedit.store import Store
from kvedit.store.remote.depot import Depot
from kvedit.store.tiers import DepotTier
from kvedit.testing.tier_contract import TierContract, contract_memory


class TestS3(TierContract):
    @pytest.fixture
    def tier(self, open_bucket):
        self.objects = open_bucket()
        return DepotTier(Depot(self.objects, "tenant"))

    def damage(self, tier, record):
        for key, size, _ in list(self.objects.list("")):
            if key.endswith(".safetensors"):
                data = bytearray(self.objects.read(key))
                data[size // 2] ^= 1
                self.objects.delete([key])
                self.objects.create(key, bytes(data))
        return True


@pytest.fixture
def place(server, open_bucket, monkeypatch, tmp_path):
    """URL and options of a fresh prefix."""
    monkeypatch.setenv("KVEDIT_CACHE", str(tmp_path / "cache"))
    options = {**server.options, "timeout": 10}
    return f"s3://{server.bucket}/{tmp_path.name}-{id(open_bucket)}", options


def opened(path, place, **how):
    return Store(path, "process", remote=place[0], remote_options=place[1], **how)


def test_push_and_pull(place, tmp_path):
    a, b = opened(tmp_path / "a", place), opened(tmp_path / "b", place)
    memory, edit = contract_memory(1), contract_memory(1, bias=True)
    a.put(memory, "m", tags=["x"], metrics={"kl": 0.5})
    a.put(edit, "m")
    assert b.pull() == ["m"]
    assert [r.record for r in b.log("m")] == [r.record for r in a.log("m")]
    assert b.log("m")[1].metrics == {"kl": 0.5}
    assert b.get("m").digest == edit.digest and b.get("m@{1}").digest == memory.digest
    assert b.pull() == [] and a.push() == 0 and b.fsck().ok
    a.rm("m")
    assert b.pull() == ["m"] and "m" not in b


def test_only_what_is_missing_travels(place, tmp_path):
    a = opened(tmp_path / "a", place)
    memory = contract_memory(1, slots=2000)
    a.put(memory, "m")
    before = a._sync.depot.pack_bytes()
    a.put(
        memory.with_layers({0: memory.layers[0].add_bias(memory.layers[0].keys.new_ones(4, 2000))}),
        "m",
    )
    assert a._sync.depot.pack_bytes() - before < 0.1 * before


def test_lazy_bytes_and_parts(place, tmp_path):
    a, b = opened(tmp_path / "a", place), opened(tmp_path / "b", place)
    memory = contract_memory(2, slots=1000)
    a.put(memory, "m")
    b.pull("m", eager=False)
    assert b.stats().local == 0
    part = b.get("m", layers=[1])
    assert part.layers[1].keys.equal(memory.layers[1].keys)
    assert b.stats().local == 0  # read by ranges, not brought
    assert b.get("m").digest == memory.digest
    assert b.stats().local > 0


def test_histories_that_part_are_told(place, tmp_path):
    a, b = opened(tmp_path / "a", place), opened(tmp_path / "b", place, write="back")
    a.put(contract_memory(1), "m")
    b.pull()
    a.put(contract_memory(2), "m")
    b.put(contract_memory(3), "m")
    with pytest.raises(RaceLost, match="went another way"):
        b.flush()
    assert b.get("m").digest == contract_memory(3).digest  # still here
    b.push("m", force=True)
    a.pull("m")
    assert a.get("m").digest == contract_memory(3).digest
    assert [r.content for r in a.log("m")][1] == contract_memory(2).digest


def test_the_url_alone(place, tmp_path, monkeypatch):
    stores = []
    for folder in ("x", "y"):  # two machines: two caches
        monkeypatch.setenv("KVEDIT_CACHE", str(tmp_path / folder))
        stores.append(Store(place[0], "process", remote_options=place[1]))
    one, two = stores
    one.put(contract_memory(1), "m")
    assert two.get("m").digest == contract_memory(1).digest
    two.put(contract_memory(2), "m")
    assert one.get("m").digest == contract_memory(2).digest
    assert one.names() == ["m"] and len(one.log("m")) == 2
    with pytest.raises(RaceLost):
        one.put(contract_memory(3), "m", expect=one.log("m")[1].record)
    two.rm("m")
    with pytest.raises(NotFound):
        one.get("m")


def _race(place, folder, number, barrier, results):
    store = Store(folder, "none", remote=place[0], remote_options=place[1])
    memory = contract_memory(100 + number)
    barrier.wait()
    try:
        store.put(memory, "race", expect="")
        results.put((number, memory.digest))
    except RaceLost:
        results.put((number, None))


def test_one_winner(place, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(4), spawn.Queue()
    jobs = [
        spawn.Process(target=_race, args=(place, tmp_path / str(n), n, barrier, results))
        for n in range(4)
    ]
    for job in jobs:
        job.start()
    found = [results.get(timeout=120) for _ in jobs]
    for job in jobs:
        job.join()
    winners = [digest for _, digest in found if digest]
    assert len(winners) == 1
    reader = opened(tmp_path / "reader", place)
    reader.pull()
    assert reader.get("race").digest == winners[0]


def test_a_server_that_dies_in_the_middle(server, place, tmp_path):
    options = {**place[1], "timeout": 5, "retry_seconds": 3.0}
    a = Store(tmp_path / "a", "process", remote=place[0], remote_options=options, write="back")
    memories = {f"m{seed}": contract_memory(seed, slots=4000) for seed in range(6)}
    a.put_many(memories)
    killer = threading.Timer(0.15, server.kill)
    killer.start()
    pushed = []
    try:
        for name in memories:
            a.push(name)
            pushed.append(name)
    except (TierUnavailable, CorruptMemory):
        pass
    killer.join()
    server.start()
    a.push()  # goes on
    b = opened(tmp_path / "b", place)
    b.pull()
    for name, memory in memories.items():
        assert b.get(name).digest == memory.digest
    assert set(pushed) <= set(b.names())


def test_without_a_server_the_folder_goes_on(tmp_path, monkeypatch):
    options = {"endpoint": "http://127.0.0.1:9", "allow_http": True, "retry_seconds": 0.5}
    options |= {"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1", "timeout": 1}
    store = Store(tmp_path / "a", "process", remote="s3://b/c", remote_options=options)
    with pytest.warns(RuntimeWarning, match="tier remote failed"):
        store.put(contract_memory(1), "m")
    assert store.get("m").digest == contract_memory(1).digest
    assert store.stats().counters.degraded == 1
    with pytest.raises(TierUnavailable):
        store.flush()
    monkeypatch.setenv("KVEDIT_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = Store("s3://b/c", "process", remote_options=options)
        with pytest.raises(TierUnavailable):
            alone.put(contract_memory(1), "m")
