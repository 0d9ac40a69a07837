"""Chain: parts in order, as one step; what its parts need, it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from kvedit.editors import Chain, Drop, Editor, Emphasize, Reader, Shift
from kvedit.errors import InvalidArgument, SpanNotFound, UnknownName
from kvedit.memory import KVMemory


@dataclass(frozen=True)
class Reading(Editor):
    """An editor that needs a reader and leaves the memory alone."""

    reproducibility: ClassVar[Literal["pure", "reader", "trained"]] = "reader"

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        assert reader is not None
        return memories[0]


class NoReader:
    def read(self, memory: Any, tokens: Any, sites: Any) -> Any:
        raise AssertionError("not asked for")


def test_an_empty_chain_is_the_identity(subject: Any) -> None:
    memory = subject("llama").memory
    edited = Chain(())(memory)
    assert edited.digest == memory.digest
    assert all(edited.layers[i] is layer for i, layer in memory.layers.items())
    assert len(edited.lineage.nodes) == 2


def test_mappings_and_editors_are_the_same_chain() -> None:
    written = Chain(
        [{"editor": "drop", "span": "box", "layers": [0]}, {"editor": "shift", "offset": 3}]
    )
    assert written == Chain((Drop("box", layers=(0,)), Shift(3)))
    assert hash(written) == hash(Chain((Drop("box", layers=(0,)), Shift(3))))
    assert Chain((written, written)).parameters()["editors"][1]["editors"][1] == {
        "editor": "shift",
        "offset": 3,
    }


def test_order_counts(subject: Any) -> None:
    memory = subject("llama").memory
    emphasize, drop = Emphasize({"slots": [0, 5]}, strength=1.0), Drop({"slots": [0, 3]})
    ab, ba = Chain((emphasize, drop))(memory), Chain((drop, emphasize))(memory)
    assert ab.digest != ba.digest
    assert ab.lineage.head.id != ba.lineage.head.id


def test_a_later_part_sees_what_an_earlier_one_left(subject: Any) -> None:
    memory = subject("llama").memory
    half = Drop({"slots": [10, memory.slots]})
    with pytest.raises(SpanNotFound, match="memory of 10 slots"):
        Chain((half, Drop({"slots": [5, 11]})))(memory)


def test_a_chain_is_as_reproducible_as_its_weakest_part(subject: Any) -> None:
    memory = subject("llama").memory
    for chain in (Chain((Shift(1), Reading())), Chain((Chain((Reading(),)),))):
        assert chain.reproducibility == "reader"
        with pytest.raises(InvalidArgument, match="pass reader="):
            chain(memory)
        edited = chain(memory, reader=NoReader())
        assert edited.lineage.head.reproducibility == "reader"
    assert Chain((Shift(1),)).reproducibility == "pure"
    assert Chain().reproducibility == "pure"


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (5, InvalidArgument, "list of editors, found 5"),
        ("shift", InvalidArgument, "holds editors, found str"),
        ([None], InvalidArgument, "holds editors, found NoneType"),
        ([Shift], InvalidArgument, "holds editors, found ABCMeta"),
        ([{"offset": 3}], InvalidArgument, "names its editor, found {'offset': 3}"),
        ([{"editor": "shitf", "offset": 3}], UnknownName, "Did you mean shift"),
        ([{"editor": "shift", "of_set": 3}], InvalidArgument, "editor shift: .*of_set"),
        ([{"editor": "shift", "offset": 0.5}], InvalidArgument, "whole number, found 0.5"),
    ],
)
def test_parts_are_checked_when_the_chain_is_made(
    parts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Chain(parts)
