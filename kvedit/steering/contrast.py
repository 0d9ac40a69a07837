"""Contrast sets: pairs of texts or chats that differ in what a delta is to carry."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["Chat", "Contrast", "Pair", "Side", "kind_of", "plain_side"]

Chat = tuple[tuple[str, str], ...]
"""Chat messages as ``(role, content)``."""

Side = str | Chat | tuple[int, ...]
"""A text, a chat, or token ids."""

_FORMAT = "kvedit-contrast/1"


@dataclass(frozen=True)
class Pair:
    """Two contexts of the same kind; lists of messages become ``(role, content)`` pairs.

    Args:
        positive: a text, chat messages, or token ids, that show what is wanted.
        negative: the same without it.

    Raises:
        InvalidArgument: if one is empty or something else, or one is a chat and the other not.
    """

    positive: Any
    negative: Any

    def __post_init__(self) -> None:
        """Brings both sides into one form."""
        object.__setattr__(self, "positive", _side(self.positive))
        object.__setattr__(self, "negative", _side(self.negative))
        if kind_of(self.positive) != kind_of(self.negative):
            raise InvalidArgument(
                f"the sides of a pair must be of one kind, found {kind_of(self.positive)} and "
                f"{kind_of(self.negative)}"
            )

    @classmethod
    def of(cls, value: Any) -> Pair:
        """Returns a pair, or makes one of two sides or a mapping with both names.

        Raises:
            InvalidArgument: if it is something else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and {"positive", "negative"} == set(value):
            return cls(value["positive"], value["negative"])
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
            return cls(*value)
        raise InvalidArgument(
            f'expected a pair (positive, negative) or {{"positive": …, "negative": …}}, found '
            f"{value!r}"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain data that :meth:`of` reads."""
        return {"positive": plain_side(self.positive), "negative": plain_side(self.negative)}


@dataclass(frozen=True)
class Contrast:
    """Pairs from which a delta is found.

    Args:
        pairs: the pairs, one at least.
        name: for people; not part of the identity.
        prompt: whether chats are read with the generation prompt behind them. None adds it behind
            the user's turn, and leaves an assistant's turn open at its last word, as if it were
            about to go on. Without a meaning for texts and ids.

    Raises:
        InvalidArgument: if there is no pair.
    """

    pairs: tuple[Pair, ...]
    name: str = ""
    prompt: bool | None = None

    def __post_init__(self) -> None:
        """Checks the pairs."""
        object.__setattr__(self, "pairs", tuple(Pair.of(pair) for pair in self.pairs))
        if not self.pairs:
            raise InvalidArgument("a contrast set needs at least one pair")

    @classmethod
    def of(
        cls, pairs: Contrast | Iterable[Any], name: str = "", prompt: bool | None = None
    ) -> Contrast:
        """Returns a set of pairs, each ``(positive, negative)`` texts, message lists or ids."""
        if isinstance(pairs, Contrast):
            return pairs
        return cls(tuple(Pair.of(pair) for pair in pairs), name, prompt)

    @classmethod
    def read(cls, path: str | Path) -> Contrast:
        """Returns the set of a file.

        JSON lines hold a pair each. JSON holds a list of pairs, or what :meth:`write` writes. A
        pair is ``{"positive": …, "negative": …}`` or ``[positive, negative]``.

        Raises:
            InvalidArgument: if the file is missing or holds something else; with the line.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"contrast file {file}: {error}") from error
        if file.suffix in (".jsonl", ".ndjson"):
            rows = enumerate(text.splitlines(), start=1)
            pairs = tuple(_read_pair(row, f"{file}, line {n}") for n, row in rows if row.strip())
            return cls(pairs, file.stem)
        data = _json(text, str(file))
        if isinstance(data, Mapping):
            if not isinstance(data.get("pairs"), list) or set(data) - _KEYS:
                raise InvalidArgument(f"contrast file {file}: expected a list of pairs")
            return cls.of(data["pairs"], str(data.get("name", file.stem)), data.get("prompt"))
        if not isinstance(data, list):
            raise InvalidArgument(f"contrast file {file}: expected a list of pairs")
        return cls.of(data, file.stem)

    def write(self, path: str | Path) -> None:
        """Writes it as JSON that :meth:`read` reads."""
        data = {
            "format": _FORMAT,
            "name": self.name,
            "prompt": self.prompt,
            "pairs": [pair.to_json() for pair in self.pairs],
        }
        text = json.dumps(data, ensure_ascii=False, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    @cached_property
    def digest(self) -> str:
        """BLAKE3 (hex) of the pairs and of how they are read; equal contents have equal digests."""
        pairs = [pair.to_json() for pair in self.pairs]
        return digest_bytes(canonical_json({"pairs": pairs, "prompt": self.prompt}))

    def split(self, share: float, seed: int = 0) -> tuple[Contrast, Contrast]:
        """Returns two sets: ``share`` of the pairs, drawn by ``seed``, and the others.

        Args:
            share: of the pairs, above 0 and below 1; each part gets one pair at least.
            seed: of the draw; both parts keep the order.

        Raises:
            InvalidArgument: if the share is out of range, or there is one pair only.
        """
        if not 0 < share < 1 or len(self) < 2:
            raise InvalidArgument(
                f"split: expected a share between 0 and 1 of two pairs at least, found {share} of "
                f"{len(self)}"
            )
        count = min(max(round(share * len(self)), 1), len(self) - 1)
        chosen = set(random.Random(seed).sample(range(len(self)), count))
        parts: list[list[Pair]] = [[], []]
        for index, pair in enumerate(self.pairs):
            parts[index not in chosen].append(pair)
        first, second = (Contrast(tuple(part), self.name, self.prompt) for part in parts)
        return first, second


_KEYS = {"format", "name", "prompt", "pairs"}


def kind_of(side: Side) -> str:
    """Returns "text", "chat" or "ids"."""
    if isinstance(side, str):
        return "text"
    return "ids" if isinstance(side[0], int) else "chat"


def plain_side(side: Side) -> Any:
    """Returns a side as plain data: text, messages as mappings, or ids."""
    if isinstance(side, str):
        return side
    return [x if isinstance(x, int) else {"role": x[0], "content": x[1]} for x in side]


def _side(value: Any) -> Side:
    if isinstance(value, str) and value:
        return value
    items = value.tolist() if isinstance(value, torch.Tensor) else value
    if isinstance(items, list | tuple) and items:
        if all(type(item) is int for item in items):
            return tuple(items)
        return tuple(_message(item) for item in items)
    raise InvalidArgument(
        f"a side of a pair is a text, chat messages or token ids, and not empty; found {value!r}"
    )


def _message(item: Any) -> tuple[str, str]:
    given = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else item
    extra = set(item) - {"role", "content"} if isinstance(item, Mapping) else ()
    two = isinstance(given, tuple | list) and len(given) == 2
    if not two or extra or not all(isinstance(part, str) for part in given):
        raise InvalidArgument(f"a message needs a role and a text content only, found {item!r}")
    return str(given[0]), str(given[1])


def _read_pair(row: str, where: str) -> Pair:
    data = _json(row, where)
    try:
        return Pair.of(data)
    except InvalidArgument as error:
        raise InvalidArgument(f"contrast file {where}: {error}") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"contrast file {where}: {error}") from error
