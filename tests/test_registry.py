"""Registries: lazy, closed, open to entry points, and helpful about names they don't know."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import pytest

import kvedit.editors
from kvedit.errors import UnknownName
from kvedit.registry import Registry


@pytest.fixture
def shelf() -> Registry:
    return Registry("tool", {"b": "fractions:Fraction", "a": "decimal:Decimal", "x": "none.such:X"})


def test_nothing_is_imported_before_it_is_asked_for(shelf: Registry) -> None:
    assert list(shelf) == ["a", "b", "x"]
    assert "x" in shelf
    assert "none.such" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        shelf.load("x")
    assert shelf.load("b").__name__ == "Fraction"


def test_unknown_names_list_near_ones(shelf: Registry) -> None:
    assert "c" not in shelf
    with pytest.raises(UnknownName, match=r"unknown tool 'c'\. *Known: a, b, x$") as caught:
        shelf.load("c")
    assert (caught.value.kind, caught.value.name) == ("tool", "c")
    with pytest.raises(UnknownName, match=r"unknown editor 'suppresss'\. Did you mean suppress\?"):
        kvedit.editors.REGISTRY.load("suppresss")


def test_targets_are_closed(shelf: Registry) -> None:
    with pytest.raises(TypeError):
        shelf.targets["c"] = "decimal:Decimal"  # type: ignore[index]
    given = {"a": "decimal:Decimal"}
    built = Registry("tool", given)
    given["b"] = "fractions:Fraction"
    assert list(built) == ["a"]


def test_entry_points_add_names_and_replace_none(
    shelf: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def points(group: str) -> list[Any]:
        assert group == "kvedit.tools"
        return [
            importlib.metadata.EntryPoint("a", "fractions:Fraction", group),
            importlib.metadata.EntryPoint("new", "collections:OrderedDict", group),
        ]

    monkeypatch.setattr("kvedit.registry.entry_points", points)
    assert list(shelf) == ["a", "b", "new", "x"]
    assert shelf.load("new").__name__ == "OrderedDict"
    assert shelf.load("a").__name__ == "Decimal"


@pytest.mark.parametrize("name", list(kvedit.editors.REGISTRY))
def test_editors_are_attributes_of_their_package(name: str) -> None:
    editor = kvedit.editors.REGISTRY.load(name)
    assert getattr(kvedit.editors, editor.__name__) is editor
    assert editor.__name__ in kvedit.editors.__all__


def test_the_editors_package_has_no_other_names() -> None:
    assert all(getattr(kvedit.editors, name) is not None for name in kvedit.editors.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Amplify'"):
        kvedit.editors.Amplify  # noqa: B018
