"""Probabilities of tokens, as each of OpenAI's two endpoints writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvedit.serving.openai.events import Chosen, Likely

__all__ = ["chat_logprobs", "text_logprobs"]

_LOWEST = -9999.0  # what OpenAI writes for a logarithm that JSON has no number for


def text_logprobs(chosen: Sequence[Chosen] | None) -> dict[str, Any] | None:
    """Returns ``logprobs`` of a completion's choice."""
    if chosen is None:
        return None
    return {
        "tokens": [each.token.text for each in chosen],
        "token_logprobs": [_number(each.token) for each in chosen],
        "top_logprobs": [_tops(each) for each in chosen],
        "text_offset": [each.offset for each in chosen],
    }


def chat_logprobs(chosen: Sequence[Chosen] | None) -> dict[str, Any] | None:
    """Returns ``logprobs`` of a chat's choice."""
    if chosen is None:
        return None
    rows = [
        {**_spelled(each.token), "top_logprobs": [_spelled(one) for one in each.top]}
        for each in chosen
    ]
    return {"content": rows, "refusal": None}


def _tops(each: Chosen) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in (*each.top, each.token):
        # Parts of characters may be spelled alike: the likeliest stays.
        found.setdefault(one.text, _number(one))
    return found


def _spelled(one: Likely) -> dict[str, Any]:
    data = list(one.text.encode()) if one.spelled else None
    return {"token": one.text, "logprob": _number(one), "bytes": data}


def _number(one: Likely) -> float:
    return max(one.logprob, _LOWEST)
