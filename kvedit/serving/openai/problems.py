"""Problems: what went wrong with a request, as OpenAI's clients expect to be told."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvedit.errors import (
    ContextTooLong,
    IncompatibleModel,
    InvalidArgument,
    KVEditError,
    NotFound,
    TemplateNotCuttable,
    TierUnavailable,
    UnsupportedModel,
)

__all__ = ["Problem", "Refusal", "problem_of"]

_LOG = logging.getLogger(__name__)

# The first that fits. What is not here is the server's fault.
_KNOWN: tuple[tuple[type[Exception], int, str | None, str | None], ...] = (
    (NotFound, 404, "model", "model_not_found"),
    (ContextTooLong, 400, None, "context_length_exceeded"),
    (IncompatibleModel, 400, "model", "memory_of_another_model"),
    (UnsupportedModel, 400, "model", "unsupported_memory"),
    (TemplateNotCuttable, 400, "messages", "template_not_cuttable"),
    (InvalidArgument, 400, None, None),
    (TierUnavailable, 503, None, "store_unavailable"),
)


@dataclass(frozen=True)
class Problem:
    """Why a request has no answer.

    Args:
        status: HTTP status.
        message: for people.
        param: the field that it is about, or None.
        code: for programs, or None.
        retry_after: seconds after which to try again, or None.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    @property
    def kind(self) -> str:
        """OpenAI's type of the error."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )

    def body(self) -> dict[str, Any]:
        """Returns the body of the response."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


class Refusal(Exception):
    """Ends the handling of a request.

    Args:
        problem: what the client is told.
    """

    def __init__(self, problem: Problem) -> None:
        """Keeps the problem."""
        super().__init__(problem.message)
        self.problem = problem


def problem_of(error: BaseException) -> Problem:
    """Returns what a client is told of an error; nothing of one that was not raised on purpose."""
    if isinstance(error, Refusal):
        return error.problem
    for kind, status, param, code in _KNOWN:
        if isinstance(error, kind):
            return Problem(status, _line(error), param, code)
    # Its message may name places that are not the client's business.
    _LOG.error("a request failed", exc_info=error)
    code = type(error).__name__ if isinstance(error, KVEditError) else "internal_error"
    return Problem(500, f"the server failed ({code}); its log says how", None, code)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
