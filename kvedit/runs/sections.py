"""Sections of a config that every pipeline has, and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvedit.editors import REGISTRY, build
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.runs import steps
from kvedit.runs.reuse import second_process
from kvedit.runs.targets import check_keys, fill, refuse_targets
from kvedit.store import Store
from kvedit.store.refs import check_labels, check_name

if TYPE_CHECKING:
    from kvedit.memory import KVMemory
    from kvedit.store import Record

__all__ = ["SHARED", "build_editor", "check_known", "check_shared", "get", "put"]

SHARED = (
    "answer", "capture", "document", "model", "questions", "reuse", "store", "task", "threads",
    "tracker",
)  # fmt: skip
"""Keys that ``kvedit/conf/run.yaml`` gives every config, beside ``pipeline``."""


def check_known(config: Mapping[str, Any], own: Sequence[str]) -> None:
    """Raises if a config has a key that its pipeline doesn't know, or asks to instantiate.

    Args:
        config: the whole config.
        own: the pipeline's own sections.

    Raises:
        InvalidArgument: if something is to be instantiated.
        UnknownName: if a key does not exist.
    """
    refuse_targets(config)
    known = sorted({*SHARED, *own, "pipeline"})
    for key in config:
        if key not in known:
            raise UnknownName("key of the config", key, known)


def check_shared(config: Mapping[str, Any], own: Sequence[str]) -> None:
    """Raises if a section is missing, or one that every pipeline has can't be used.

    Args:
        config: the whole config.
        own: sections that this pipeline needs as well.

    Raises:
        InvalidArgument: if a value is missing or out of range.
        UnknownName: if a key does not exist.
    """
    for key in (*SHARED, *own):
        if key not in config:
            raise InvalidArgument(f"the config lacks {key}; compose it from kvedit/conf/run.yaml")
    threads = config["threads"]
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InvalidArgument(f"threads: expected a number from 1 on, or null, found {threads!r}")
    check_keys("model", steps.load_model, config["model"])
    check_keys("capture", steps.capture, config["capture"], given=2)
    check_keys("answer", steps.answer, config["answer"], given=3)
    check_keys("reuse", second_process, config["reuse"], given=3)
    fill("store", _check_store, config["store"])


def build_editor(section: Mapping[str, Any], name: str = "editor") -> Any:
    """Returns the editor that a section names, built from its other keys.

    Args:
        section: ``editor`` and that editor's parameters.
        name: name of the section, for messages.

    Raises:
        UnknownName: if the editor or a parameter does not exist.
        InvalidArgument: if a parameter is out of range.
    """
    if not isinstance(section, Mapping):
        raise InvalidArgument(f"{name}: expected keys and values, found {section!r}")
    parameters = dict(section)
    chosen = parameters.pop("editor", "")
    check_keys(name, REGISTRY.load(chosen), parameters)
    return build(editor=chosen, **parameters)


def get(path: str, ref: str) -> KVMemory:
    """Returns the memory of a reference in the store at ``path``."""
    with Store(path) as store:
        return store.get(ref)


def put(
    memory: KVMemory,
    path: str,
    name: str,
    message: str = "",
    tags: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
) -> Record:
    """Returns the new version of a name in the store at ``path``."""
    with Store(path) as store:
        return store.put(memory, name, message=message, tags=tags, metrics=metrics)


def _check_store(path: str, name: str, message: str = "", tags: Sequence[str] = ()) -> None:
    check_name(name)
    check_labels(message, tags)
    Store(path).close()
