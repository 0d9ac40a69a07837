"""Fetching: a folder on this machine, or a repository on the hub that is brought here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kvedit.errors import InvalidArgument, NotFound

__all__ = ["local_folder"]


def local_folder(
    place: str | os.PathLike[str],
    patterns: Sequence[str],
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Path, dict[str, str]]:
    """Returns a folder that holds the files, and what a lineage should say of where it was.

    A folder's own path is nobody else's business and stays out of the lineage.

    Args:
        place: a folder, or the name of a repository on the hub (``"owner/name"``).
        patterns: the files that are wanted of a repository.
        revision: branch, tag or commit of a repository.
        token: for a private repository.

    Raises:
        InvalidArgument: if it is a file.
        NotFound: if it is neither a folder nor the name of a repository that can be fetched.
    """
    path = Path(place)
    if path.is_dir():
        return path, {}
    if path.exists():
        raise InvalidArgument(f"{path} is a file: name the folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name = os.fspath(place)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise NotFound(f"{name!r} is not here, and no repository (owner/name) either")
    try:
        found = snapshot_download(
            name, revision=revision, token=token, allow_patterns=list(patterns)
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        # What the hub says may run over many lines.
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotFound(
            f"{name!r} is not here, and no repository that could be fetched: {said}"
        ) from error
    # The cache of the hub names a snapshot by its commit.
    return Path(found), {"repository": name, "commit": Path(found).name}
