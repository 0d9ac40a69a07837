"""WandbTracker: Weights & Biases, offline unless told otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kvedit.errors import InvalidArgument, MissingDependency
from kvedit.tracking.base import RunFacts, Tracker

__all__ = ["WandbTracker"]

_UPLOAD_LIMIT = 64 * 2**20
_MODES = ("offline", "online", "disabled")


class WandbTracker(Tracker):
    """Notes a run in Weights & Biases; the resolved config and versions are the run's config.

    It never logs in. ``mode="online"`` needs a login that is there already; an offline run lies in
    the run's folder, and ``wandb sync`` sends it later. Stored memories are referred to, not
    uploaded: the store stays the place where they are.

    Args:
        folder: the run's folder; ``wandb/`` is made in it.
        facts: what is known before the run begins.
        project: the W&B project.
        mode: ``"offline"``, ``"online"`` or ``"disabled"``.
        entity: W&B user or team; None takes the default of the login.
        group: name that ties the runs of a sweep together.
        tags: labels of the run.

    Raises:
        MissingDependency: if wandb is not installed.
        InvalidArgument: if wandb refuses to start.
    """

    def __init__(
        self,
        folder: Path,
        facts: RunFacts,
        project: str = "kvedit",
        mode: Literal["offline", "online", "disabled"] = "offline",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        """Starts the run."""
        if mode not in _MODES:
            raise InvalidArgument(f"wandb mode must be one of {', '.join(_MODES)}, found {mode!r}")
        try:
            import wandb  # here and not above: the import alone takes seconds
        except ImportError as error:
            raise MissingDependency("wandb", "all", "tracker=wandb") from error

        folder.mkdir(parents=True, exist_ok=True)
        config = {**facts.config, "versions": dict(facts.versions)}
        self._wandb = wandb
        self._open = True
        try:
            self._run = wandb.init(
                project=project, entity=entity, group=group, tags=list(tags), mode=mode,
                dir=str(folder), config=config, job_type=facts.task,
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise InvalidArgument(
                f"wandb mode {mode!r}: {error}; offline needs no login"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs numbers at a step."""
        self._run.log(dict(metrics), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table; cells become text, since W&B wants one type per column."""
        data = [["" if cell is None else str(cell) for cell in row] for row in rows]
        self._run.log({name: self._wandb.Table(columns=list(columns), data=data)})

    def artifact(self, name: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """Logs a file up to 64 MiB whole, anything else as a reference to where it is."""
        label = re.sub(r"[^\w.-]", "-", name)
        made = self._wandb.Artifact(label, type="memory", metadata=dict(metadata))
        if path.is_file() and path.stat().st_size <= _UPLOAD_LIMIT:
            made.add_file(str(path))
        else:
            made.add_reference(path.resolve().as_uri(), checksum=False)
        self._run.log_artifact(made)

    def close(self) -> None:
        """Ends the run."""
        if self._open:
            self._open = False
            self._run.finish()
