"""Elsewhere: work in a process of its own, which gets one JSON request and gives one JSON reply."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from kvedit.errors import KVEditError

__all__ = ["ask_elsewhere", "serve"]


def ask_elsewhere(module: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what ``python -m module`` made of a request.

    Args:
        module: a module that calls :func:`serve`.
        request: plain data.

    Raises:
        KVEditError: if it refused, with its message, or died.
    """
    done = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(request), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    try:
        reply: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise KVEditError(f"the second process ended with {done.returncode}: {last}") from None
    if "error" in reply:
        raise KVEditError(f"the second process refused: {reply['error']}")
    return reply


def serve(work: Callable[[Any], Mapping[str, Any]]) -> int:
    """Returns 0 after answering the request on stdin; 1 with the reason as ``error`` if refused.

    Args:
        work: from the request to the reply.
    """
    # What libraries print must not get between the reply's brackets.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            reply: Mapping[str, Any] = work(json.load(sys.stdin))
        except (KVEditError, OSError) as error:
            reply = {"error": " ".join(str(error).split())}
    print(json.dumps(reply))
    return 1 if "error" in reply else 0
