"""Recipe: a memory kept as the steps that made it, and not as its bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.memory import KVMemory, Lineage, LineageNode
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store.parsing import SHAPE_ERRORS
from kvedit.store.records import Record
from kvedit.store.refs import is_digest

__all__ = ["RECIPE", "Recipe", "encode_recipe", "is_recipe"]

RECIPE = "recipe"
"""What stands in place of a codec."""

_FORMAT = "kvedit.recipe.1"


@dataclass(frozen=True)
class Recipe:
    """How to make a memory again.

    Args:
        content: content digest of the memory.
        base: record digest of a stored memory that one of the steps made.
        lineage: the steps.
    """

    content: str
    base: str
    lineage: Lineage

    @classmethod
    def parse(cls, data: bytes, record: str) -> Recipe:
        """Returns the recipe that these bytes are.

        Raises:
            CorruptMemory: if they are changed or no recipe.
            InvalidArgument: if a newer version of the library wrote them.
        """
        if digest_bytes(data) != record:
            raise CorruptMemory(f"recipe {record}: its bytes are not those that were put")
        try:
            found = json.loads(data)
            if found["format"] != _FORMAT:
                raise InvalidArgument(
                    f"recipe {record} has format {found['format']!r}, this kvedit reads "
                    f"{_FORMAT}: use a newer kvedit"
                )
            lineage = Lineage(tuple(LineageNode.from_json(node) for node in found["lineage"]))
            recipe = cls(found["content"], found["base"], lineage)
            if not is_digest(recipe.content) or not is_digest(recipe.base):
                raise CorruptMemory(f"recipe {record} does not name its memories by digests")
            return recipe
        except InvalidArgument:
            raise
        except SHAPE_ERRORS as error:
            raise CorruptMemory(f"recipe {record} can't be read: {error!r}") from error


def encode_recipe(memory: KVMemory, base: str) -> bytes:
    """Returns the canonical bytes of a memory's recipe; their BLAKE3 is its record digest.

    Args:
        memory: the memory.
        base: record digest of a stored memory that one of its steps made.
    """
    return canonical_json(
        {
            "format": _FORMAT,
            "codec": RECIPE,
            "content": memory.digest,
            "base": base,
            "lineage": [node.to_json() for node in memory.lineage.nodes],
            "model_name": memory.model.name,
        }
    )


def is_recipe(record: Record) -> bool:
    """Returns whether a version is kept as a recipe."""
    return record.codec == RECIPE
