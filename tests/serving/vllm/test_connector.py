"""The connector's own part, without vLLM: its options, and what it does with a failed load."""

from types import SimpleNamespace

import pytest

import kvedit as kv
from kvedit.errors import InvalidArgument
from kvedit.models.tiny import tiny_model
from kvedit.serving.vllm.connector import MemoryConnector, _options
from kvedit.serving.vllm.plans import Load, Plans


def made(**facts):
    """A connector that was told nothing but these facts."""
    connector = MemoryConnector.__new__(MemoryConnector)
    vars(connector).update(facts)
    return connector


def config(extra):
    return SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra))


def test_options():
    assert _options(config({"store": "x", "verify": "deep"})) == {"store": "x", "verify": "deep"}
    for wrong in ({}, {"store": ""}, {"store": "x", "root": "y"}):
        with pytest.raises(InvalidArgument, match="expected store, and some of"):
            _options(config(wrong))


def test_the_store_of_a_tenant_with_a_key(tmp_path):
    pytest.importorskip("cryptography")
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    with kv.Store(tmp_path / "store", namespace="tenant", key=key) as store:
        store.put(kv.capture(*tiny_model("llama"), "The thing in the box."), "notes")
    options = {"store": str(tmp_path / "store"), "namespace": "tenant", "key": str(key)}
    found = made(_options=options).store
    assert found.get("notes").slots > 0
    with pytest.raises(kv.errors.KVEditError):
        made(_options={**options, "key": str(tmp_path / "other")}).store.get("notes")


def test_a_load_that_fails_fails_its_own_pages(caplog):
    class Broken:
        def load(self, digest):
            raise RuntimeError(f"no {digest}")

    plans = Plans((Load("a" * 64, 9, 0, (4, 7, 2)), Load("b" * 64, 3, 0, (5,))), ("one",))
    connector = made(
        _page=4, _failed_pages=set(), _turned_away=set(), loader=Broken(), _order=[],
        _get_connector_metadata=lambda: plans,
    )  # fmt: skip
    connector.start_load_kv(SimpleNamespace(no_compile_layers={}), scheduler_output=None)
    assert connector.get_block_ids_with_load_errors() == {4, 7, 2, 5}
    assert connector.get_block_ids_with_load_errors() == set()
    assert connector._turned_away == {"one"}
    assert "memory aaaaaaaaaaaa is not served: no aaa" in caplog.text


def test_a_memory_of_other_slots_than_planned_is_not_written():
    loader = SimpleNamespace(load=lambda digest: SimpleNamespace(slots=8))
    connector = made(
        _page=4, _failed_pages=set(), _turned_away=set(), loader=loader, _order=[],
        _get_connector_metadata=lambda: Plans((Load("a", 9, 4, (4, 7, 2)),)),
    )  # fmt: skip
    connector.start_load_kv(SimpleNamespace(no_compile_layers={}))
    assert connector.get_block_ids_with_load_errors() == {7, 2}
