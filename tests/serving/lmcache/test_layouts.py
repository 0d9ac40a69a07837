"""Bytes of a chunk, against what LMCache 0.5.6 itself gathered from an engine's pages."""

import pytest
import torch

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.serving.lmcache.layouts import LAYOUTS, Layout, layout_of_format

# gather_paged_kv_to_cpu of LMCache 0.5.6 over pages of two tokens, in the order 2, 0, with keys
# 0 to 31 and values 100 to 131 of two layers, two heads, four tokens, two numbers.
# fmt: off
PACKED = [
    0, 1, 100, 101, 8, 9, 108, 109, 2, 3, 102, 103, 10, 11, 110, 111, 4, 5, 104, 105, 12, 13, 112,
    113, 6, 7, 106, 107, 14, 15, 114, 115, 16, 17, 116, 117, 24, 25, 124, 125, 18, 19, 118, 119, 26,
    27, 126, 127, 20, 21, 120, 121, 28, 29, 128, 129, 22, 23, 122, 123, 30, 31, 130, 131,
]
SPLIT = [
    0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 16, 17, 24, 25, 18, 19, 26, 27, 20, 21,
    28, 29, 22, 23, 30, 31, 100, 101, 108, 109, 102, 103, 110, 111, 104, 105, 112, 113, 106, 107,
    114, 115, 116, 117, 124, 125, 118, 119, 126, 127, 120, 121, 128, 129, 122, 123, 130, 131,
]
# fmt: on


@pytest.fixture
def keys():
    return torch.arange(32.0).reshape(2, 2, 4, 2)  # layer, head, token, dim


@pytest.mark.parametrize(
    ("name", "shape", "recorded"), [("packed", (2, 4, 8), PACKED), ("split", (2, 2, 4, 4), SPLIT)]
)
def test_chunk_is_what_lmcache_gathers(keys, name, shape, recorded):
    found = Layout(name).payload(keys, keys + 100)
    assert found.shape == shape
    assert found.is_contiguous()
    assert found.int().flatten().tolist() == recorded
    assert shape[-1] == Layout(name).width(2, 2)


def test_cpu_pages_hold_turned_keys_then_values(keys):
    """Of each head in each page: keys with tokens innermost, then values (vLLM 0.32, CPU_ATTN)."""
    found = Layout("vllm-cpu", 2).payload(keys, keys + 100)
    assert found.shape == (2, 4, 8)
    # Rows of a page lie per token, heads side by side; a head's rows together are its page.
    pages = found.reshape(2, 2, 2, 2, 4)  # layer, page, row, head, width
    first = pages[0, 0, :, 0].flatten().tolist()  # tokens 0 and 1 of layer 0, head 0
    assert first == [0, 2, 1, 3, 100, 101, 102, 103]
    last = pages[1, 1, :, 1].flatten().tolist()  # tokens 2 and 3 of layer 1, head 1
    assert last == [28, 30, 29, 31, 128, 129, 130, 131]


def test_cpu_pages_must_fill_chunks(keys):
    with pytest.raises(InvalidArgument, match="pages of 3 tokens"):
        Layout("vllm-cpu", 3).payload(keys, keys)
    with pytest.raises(InvalidArgument, match="tokens of a page"):
        Layout("vllm-cpu")


def test_names():
    with pytest.raises(UnknownName, match="packed"):
        Layout("pakced")
    assert layout_of_format("NL_X_NB_NH_BS_CS") == "packed"
    assert layout_of_format("NL_X_TWO_NB_BS_NH_HS") == "split"
    assert {"packed", "split", "vllm-cpu"} == set(LAYOUTS)
    with pytest.raises(InvalidArgument, match="NL_X_NB_BS_HS"):  # latents
        layout_of_format("NL_X_NB_BS_HS")
