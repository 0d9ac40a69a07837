"""Retries: exponential backoff with jitter, bounded by time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kvedit.errors import InvalidArgument, TierUnavailable
from kvedit.store.remote.failures import Failure, describe, failure_of

__all__ = ["Again", "Retry"]

Answer = TypeVar("Answer")


class Again(Exception):
    """The server is in the middle of something: nothing happened, the call is worth a new try."""


@dataclass(frozen=True)
class Retry:
    """How long and how often a failed request is tried again.

    The wait before try n is drawn from [0, first · 2ⁿ] ("full jitter"; Brooker, "Exponential
    Backoff And Jitter", AWS Architecture Blog, 2015), so that clients that failed together don't
    come back together.

    Args:
        seconds: no try begins later than this after the first one; 0 tries once.
        first: upper bound of the first wait, in seconds.
        longest: upper bound of every wait, in seconds.

    Raises:
        InvalidArgument: if a number is negative.
    """

    seconds: float = 30.0
    first: float = 0.1
    longest: float = 5.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if min(self.seconds, self.first, self.longest) < 0:
            raise InvalidArgument(f"seconds of a retry can't be negative, found {self}")

    def run(self, task: str, call: Callable[[bool], Answer]) -> Answer:
        """Returns what ``call`` returns, in the end.

        Args:
            task: what is done and where, for the message.
            call: the request. It is told whether an earlier try failed in a way that leaves open
                whether the server has carried it out.

        Raises:
            TierUnavailable: if it failed for good, or the time is over.
        """
        from obstore.exceptions import BaseError

        begin, wait, maybe = time.monotonic(), self.first, False
        dice = random.SystemRandom()
        while True:
            try:
                return call(maybe)
            except Again as error:
                reason, cause = str(error), error.__cause__
            except (BaseError, OSError, NotImplementedError) as error:
                failure = failure_of(error)
                if not failure.transient:
                    raise TierUnavailable(f"can't {task}: {describe(error)}") from error
                maybe = maybe or failure is Failure.AMBIGUOUS
                reason, cause = describe(error), error
            pause = dice.uniform(0.0, wait)
            if time.monotonic() - begin + pause >= self.seconds:
                raise TierUnavailable(
                    f"can't {task}, gave up after {time.monotonic() - begin:.1f} s of tries: "
                    f"{reason}; the same call may be repeated once the place answers again"
                ) from cause
            time.sleep(pause)
            wait = min(2.0 * wait, self.longest)
