"""What a codec makes of a put: another digest, a bound on its error."""

import pytest
import torch

from kvedit.errors import InvalidArgument

from .conftest import build_memory, with_message


def test_codecs(store):
    memory = build_memory(1, slots=300, dtype=torch.bfloat16)
    store.put(memory, "raw")
    assert store.put(memory, "zstd", codec="planes-zstd").content == memory.digest
    record = store.put(memory, "int8", codec="int8")
    found = store.get("int8")
    assert record.content == found.digest != memory.digest
    error = (found.layers[0].keys - memory.layers[0].keys).float().norm()
    assert 0 < error < 0.02 * memory.layers[0].keys.float().norm()
    assert found.lineage.head.name == "codec"
    tiny = memory.with_layers(
        {
            index: type(layer)(layer.keys * 1.004, layer.values, layer.positions, layer.source)
            for index, layer in memory.layers.items()
        }
    )
    edit = with_message(tiny, '{"factor":1.004}')
    with pytest.raises(InvalidArgument, match="codec"):
        store.put(edit, "edit", codec="int4")  # the edit would drown in it
    store.put(edit, "edit", codec="int4", force=True)
