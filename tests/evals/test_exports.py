"""The room's names: all there, none hidden behind a module of the same name."""

from __future__ import annotations

import importlib
import pkgutil
import types

import pytest

from kvedit import evals


def test_every_name_resolves_to_no_module() -> None:
    for found in pkgutil.iter_modules(evals.__path__):
        importlib.import_module(f"kvedit.evals.{found.name}")
    assert set(evals.__all__) <= set(dir(evals))
    for name in evals.__all__:
        assert not isinstance(getattr(evals, name), types.ModuleType), name
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        evals.absent  # noqa: B018
