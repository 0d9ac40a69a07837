"""Health: what a checkup of a store found."""

from __future__ import annotations

from dataclasses import dataclass

from kvedit.memory.show import human_bytes

__all__ = ["Health", "Problem"]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong in a store.

    Args:
        what: what it is and where.
        repaired: what was done about it; empty where nothing was.
    """

    what: str
    repaired: str = ""

    def __str__(self) -> str:
        """One line."""
        return f"{self.what}: {self.repaired}" if self.repaired else self.what


@dataclass(frozen=True)
class Health:
    """What fsck found.

    Args:
        packs: packs that were read.
        blocks: blocks whose digest was checked.
        bytes: bytes that were read.
        memories: versions whose blocks are all sound.
        problems: what is wrong, or was before the repair.
        lost: versions that can't be read, as ``name v3``.
    """

    packs: int
    blocks: int
    bytes: int
    memories: int
    problems: tuple[Problem, ...]
    lost: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is as it should be now."""
        return not self.lost and all(problem.repaired for problem in self.problems)

    def __str__(self) -> str:
        """What was read, then one line per problem."""
        head = (
            f"{self.packs} packs, {self.blocks} blocks, {human_bytes(self.bytes)} read; "
            f"{self.memories} versions sound, {len(self.lost)} can't be read"
        )
        lines = [head, *map(str, self.problems), *(f"can't be read: {name}" for name in self.lost)]
        return "\n".join(lines)
