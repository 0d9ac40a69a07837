"""The error tree: one base, builtin kinds that callers expect, messages that help."""

from __future__ import annotations

import pytest

from kvedit import errors

ALL = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_every_error_has_the_base_and_says_when(error: type[Exception]) -> None:
    assert issubclass(error, errors.KVEditError)
    assert (error.__doc__ or "").strip().splitlines()[0].endswith(".")


def test_no_error_is_left_out() -> None:
    defined = {
        name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, errors.KVEditError)
    }
    assert defined == set(errors.__all__)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.InvalidArgument, ValueError),
        (errors.ShapeMismatch, ValueError),
        (errors.ContextTooLong, ValueError),
        (errors.SpanNotFound, LookupError),
        (errors.AmbiguousSpan, LookupError),
        (errors.NotFound, LookupError),
        (errors.UnknownName, LookupError),
        (errors.UnsupportedModel, NotImplementedError),
        (errors.MissingDependency, ImportError),
    ],
)
def test_callers_may_catch_the_builtin_kind(
    error: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(error, builtin)


def test_an_unknown_name_shows_near_and_known_ones() -> None:
    error = errors.UnknownName("editor", "dropo", ["keep", "drop"])
    assert str(error) == "unknown editor 'dropo'. Did you mean drop? Known: drop, keep"
    assert (error.kind, error.name, error.known) == ("editor", "dropo", ("drop", "keep"))
    assert str(errors.UnknownName("tier", "x", [])) == "unknown tier 'x'. Known: none"
    assert "Did you mean" not in str(errors.UnknownName("tier", "zzz", ["disk"]))


def test_a_missing_library_names_the_extra() -> None:
    error = errors.MissingDependency("gguf", "gguf", "reading a GGUF file")
    assert str(error) == (
        "reading a GGUF file needs gguf, which is not installed: pip install 'kvedit[gguf]'"
    )
    assert (error.library, error.extra) == ("gguf", "gguf")
