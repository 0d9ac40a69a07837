"""``kvedit-run``: the Hydra command. It composes a config, and hands it to the pipeline as data.

Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted; reasons are one line on
stderr. With ``HYDRA_FULL_ERROR=1`` errors keep their traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvedit.errors import InvalidArgument, KVEditError
from kvedit.runs.config_problems import config_problem

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["main", "plain", "recipes_folder"]

_INTERRUPTED = 130
_FULL = "HYDRA_FULL_ERROR"
_RECIPES = "KVEDIT_RECIPES"


def main() -> int:
    """Runs the command line and returns the exit status."""
    problem = _unsupported_python(sys.version_info[:2], version("hydra-core"))
    if problem:
        return _refuse(problem, 2)
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    asked = os.environ.get(_FULL)
    run: Callable[[], Any] = hydra.main(
        config_path="pkg://kvedit.conf", config_name="run", version_base="1.3"
    )(_run)
    try:
        # Without the full error, Hydra would print it in its own way, and exit.
        with _environment(
            {_FULL: "1", _RECIPES: os.environ.get(_RECIPES) or str(recipes_folder())}
        ):
            run()
    except (HydraException, OmegaConfBaseException) as error:
        if asked:
            raise
        return _refuse(str(error).split("Config search path:")[0], 2)
    except _Refused as refused:
        if asked:
            raise refused.reason from None
        return _refuse(refused.reason, 1)
    except KeyboardInterrupt:
        return _refuse("interrupted", _INTERRUPTED)
    except Exception as error:
        # Hydra lets some mistakes in configs through as they are.
        problem = config_problem(error, sys.argv[1:])
        if asked or problem is None:
            raise
        return _refuse(problem, 2)
    return 0


def recipes_folder() -> Path:
    """Returns the folder that holds the ``recipes/`` and ``experiments/`` of this kvedit.

    They are installed inside the package; in a checkout they stand beside it.
    """
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf" / "recipes").is_dir() else package.parent


def plain(config: DictConfig) -> dict[str, Any]:
    """Returns a composed config as plain data, interpolations resolved.

    Raises:
        InvalidArgument: if a value that must be given is missing, or can't be resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        found: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise InvalidArgument(f"{key}: {error}; set it with {key}=..." if key else error) from error
    return dict(found)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Refused(BaseException):
    """Carries an error past Hydra, which would print it in its own way."""

    def __init__(self, reason: Exception) -> None:
        self.reason = reason


def _run(config: DictConfig) -> float | None:
    # Heavy imports wait until the config is composed: completion and --help stay fast.
    from hydra.core.hydra_config import HydraConfig

    from kvedit.runs.pipelines import run

    try:
        report = run(plain(config), Path(HydraConfig.get().runtime.output_dir))
    except (KVEditError, OSError) as error:
        raise _Refused(error) from error
    print(f"\n{report.text()}")
    return report.gain  # what a sweeper may optimise


def _unsupported_python(python: tuple[int, ...], hydra: str) -> str | None:
    old = tuple(map(int, hydra.split(".")[:2])) < (1, 4)
    if python < (3, 14) or not old:
        return None
    return (
        f"Hydra {hydra} has no working command line on Python {'.'.join(map(str, python))}: use "
        "Python 3.11 to 3.13. The library, `kvedit` and kvedit.runs.pipelines.run work here as well"
    )


def _refuse(reason: Exception | str, status: int) -> int:
    print(f"kvedit-run: {' '.join(str(reason).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
