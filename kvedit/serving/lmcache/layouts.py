"""Layouts: how keys and values lie in a chunk, which is how the engine's own pages have them.

LMCache copies pages and knows no names for what is in them. Its chunk is ``[2, layer, token,
(head dim)]`` where an engine keeps keys and values apart, and ``[layer, token, (head width)]``
where it keeps both in one row of each head (LMCache 0.5.6, ``EngineKVFormat``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange

from kvedit.errors import InvalidArgument, UnknownName

__all__ = ["LAYOUTS", "Layout", "layout_of_format"]

LAYOUTS = ("packed", "split", "vllm-cpu")
"""Names of layouts."""

_OF_FORMAT = {
    "NL_X_NB_NH_BS_CS": "packed",
    "NL_X_NB_BS_NH_CS": "packed",
    "NL_X_NB_NH_BS_TWO_HS": "packed",
    "NL_X_NB_BS_NH_TWO_HS": "packed",
    "NL_X_TWO_NB_BS_NH_HS": "split",
    "NL_X_TWO_NB_NH_BS_HS": "split",
    "NL_X_NB_TWO_BS_NH_HS": "split",
    "NL_X_NB_TWO_NH_BS_HS": "split",
}


@dataclass(frozen=True)
class Layout:
    """How a chunk's bytes follow each other.

    Args:
        name: ``packed``: of each head the key, then the value (vLLM 0.32 on GPUs); ``split``: all
            keys, then all values (engines with a K/V axis); ``vllm-cpu``: of each head in each
            page the keys with tokens innermost, then the values (vLLM 0.32's CPU_ATTN).
        block: tokens of one of the engine's pages; only ``vllm-cpu`` needs it.

    Raises:
        UnknownName: if there is no such layout.
        InvalidArgument: if the size of a page is missing.
    """

    name: str
    block: int = 0

    def __post_init__(self) -> None:
        """Checks name and size."""
        if self.name not in LAYOUTS:
            raise UnknownName("layout", self.name, LAYOUTS)
        if self.name == "vllm-cpu" and self.block < 1:
            raise InvalidArgument(
                "layout vllm-cpu: expected the tokens of a page of the engine, found none: start "
                "the engine before the export, or pass block="
            )

    @property
    def one_plane(self) -> bool:
        """Whether keys and values share a row."""
        return self.name != "split"

    def width(self, heads: int, dim: int) -> int:
        """Returns the numbers of one token in one plane of one layer."""
        return heads * dim * (2 if self.one_plane else 1)

    def payload(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Returns a chunk as LMCache holds it.

        Args:
            keys: ``[layer, head, token, dim]``.
            values: ``[layer, head, token, dim]``.

        Returns:
            ``[kv, layer, token, (head dim)]``, or ``[layer, token, (head width)]``; contiguous.
        """
        if self.name == "vllm-cpu":
            return _cpu_pages(keys, values, self.block)
        both = torch.stack((keys, values))
        if self.name == "split":
            apart = rearrange(both, "kv layer head token dim -> kv layer token (head dim)")
            return apart.contiguous()
        rows = rearrange(both, "kv layer head token dim -> layer token (head kv dim)")
        return rows.contiguous()


def layout_of_format(name: str) -> str:
    """Returns the layout of one of LMCache's engine formats.

    Raises:
        InvalidArgument: if kvedit does not write it.
    """
    if name not in _OF_FORMAT:
        known = ", ".join(sorted(_OF_FORMAT))
        raise InvalidArgument(
            f"the engine has its keys and values as {name}; kvedit writes {known}"
        )
    return _OF_FORMAT[name]


def _cpu_pages(keys: torch.Tensor, values: torch.Tensor, block: int) -> torch.Tensor:
    """A page's bytes are cut into as many rows as it has tokens; a row is then no token's."""
    if keys.shape[2] % block:
        raise InvalidArgument(f"pages of {block} tokens don't fill a chunk of {keys.shape[2]}")
    turned = rearrange(
        keys, "layer head (page token) dim -> layer page head (dim token)", token=block
    )
    plain = rearrange(
        values, "layer head (page token) dim -> layer page head (token dim)", token=block
    )
    pages = torch.cat((turned, plain), dim=-1)
    rows = rearrange(
        pages, "layer page head (token width) -> layer (page token) (head width)", token=block
    )
    return rows.contiguous()
