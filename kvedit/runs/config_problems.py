"""Config problems: mistakes in configs that Hydra lets through as errors of Python or YAML."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["config_problem"]

_NO_OPTION = "Config group override must be a string or a list"  # Hydra's words
_GROUP = re.compile(r"\+{0,2}([\w/@.-]+)=")


def config_problem(error: Exception, overrides: Sequence[str]) -> str | None:
    """Returns what a user did wrong in a config, in words; None for any other error.

    Args:
        error: what was raised while a config was composed.
        overrides: the words of the command line.
    """
    import yaml  # type: ignore[import-untyped]

    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f" in {mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        return f"expected YAML, found something else{place}: {what}; correct the file there"
    if isinstance(error, UnicodeDecodeError | yaml.YAMLError):
        return (
            f"expected config files in UTF-8, found one that is not ({error}): look at what "
            f"{', '.join(_options(overrides)) or 'the config'} names"
        )
    if isinstance(error, ValueError) and str(error).startswith(_NO_OPTION):
        return _without_option(overrides)
    return None


def _options(overrides: Sequence[str]) -> list[str]:
    words = [word for word in overrides if not word.startswith("hydra/")]
    return [word for word in words if _GROUP.match(word) and "." not in word.split("=")[0]]


def _without_option(overrides: Sequence[str]) -> str:
    found = [w for w in _options(overrides) if w.partition("=")[2].strip().lower() == "null"]
    group = _GROUP.match(found[0])[1] if found else "GROUP"  # type: ignore[index]
    return (
        f"expected the name of an option for a config group, found {', '.join(found) or 'null'}: "
        f"name one ({group}=NAME; `kvedit-run --help` lists them), or leave the group out with "
        f"~{group}"
    )
