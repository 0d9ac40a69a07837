"""The requests: what a client may ask, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from kvedit.serving.openai.fields import without_neutral
from kvedit.serving.openai.problems import Problem, Refusal

__all__ = ["AnyAsked", "Asked", "ChatAsked", "CompletionAsked", "Message", "parse"]

Prompt = str | tuple[int, ...]
"""A text or token ids."""

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
_ROLES = ("system", "user", "assistant")
_STOPS = 4  # as many as OpenAI takes
_STOP = 256  # characters: each is matched against the whole vocabulary


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """Returns one or several prompts, as a tuple."""
    if isinstance(value, str):
        return (value,)
    if _is_ids(value):
        return (tuple(value),)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return tuple(value)
    if isinstance(value, list) and value and all(map(_is_ids, value)):
        return tuple(map(tuple, value))
    raise ValueError("expected a text, a list of texts, token ids, or a list of these")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    fine = isinstance(found, list) and len(found) <= _STOPS
    if not fine or not all(isinstance(one, str) and 0 < len(one) <= _STOP for one in found):
        raise ValueError(f"expected up to {_STOPS} texts of 1 to {_STOP} characters")
    return tuple(found)


def _role(value: Any) -> Any:
    if value not in _ROLES:
        raise ValueError(f"expected one of {', '.join(_ROLES)}, found {value!r}")
    return value


def _content(value: Any) -> str:
    """Returns a text, also of a list with one part of text."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        part = dict(value[0])
        if part.pop("type", None) == "text" and set(part) == {"text"}:
            value = part["text"]
    if not isinstance(value, str):
        raise ValueError("expected a text, or a list with one part of type text")
    return value


def _messages(value: Any) -> Any:
    # Clients that send a reply back spell out its empty fields.
    if not isinstance(value, list):
        raise ValueError("expected a list of messages")
    return tuple(
        {name: part for name, part in one.items() if part is not None}
        if isinstance(one, dict)
        else one
        for one in value
    )


class _StreamOptions(BaseModel):
    model_config = _STRICT
    include_usage: bool = False


class Message(BaseModel):
    """One chat message."""

    model_config = _STRICT
    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)]


class Asked(BaseModel):
    """What completions and chats have in common. What is not sent is left to ``kv.generate``."""

    model_config = _STRICT
    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    stream: bool = False
    stream_options: _StreamOptions | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of ``kv.generate``; a temperature of 0 is greedy decoding."""
        if self.temperature == 0:
            return {}
        names = ("temperature", "top_p", "top_k")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends by telling the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raises Refusal where fields contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise Refusal(Problem(400, "stream_options goes with stream=true", "stream_options"))


class CompletionAsked(Asked):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_prompts)]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)


class ChatAsked(Asked):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[tuple[Message, ...], BeforeValidator(_messages)] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def check(self) -> None:
        """Raises Refusal where fields contradict each other."""
        super().check()
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise Refusal(
                Problem(400, "max_tokens and max_completion_tokens differ: send one", "max_tokens")
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(Problem(400, "top_logprobs goes with logprobs=true", "top_logprobs"))


AnyAsked = CompletionAsked | ChatAsked
"""A request of either kind."""


def parse(kind: type[AnyAsked], body: bytes) -> AnyAsked:
    """Returns a checked request.

    Args:
        kind: what it should be.
        body: UTF-8 JSON.

    Raises:
        Refusal: with status 400, naming the field that is wrong.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(Problem(400, f"the body is no JSON: {error}", code="invalid_json")) from None
    if not isinstance(data, dict):
        raise Refusal(Problem(400, "the body is no JSON object", code="invalid_json"))
    kept = without_neutral(data, frozenset(kind.model_fields))
    try:
        asked = kind.model_validate(kept)
    except ValidationError as error:
        raise Refusal(_problem(error)) from None
    asked.check()
    return asked


def _problem(error: ValidationError) -> Problem:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in _place(first["loc"]))
    message = str(first["msg"]).removeprefix("Value error, ")
    return Problem(400, f"{where}: {message}", where, "invalid_value")


def _place(loc: Sequence[int | str]) -> Sequence[int | str]:
    # Behind a field's own name and the index of a message, pydantic names branches of unions.
    return loc[:3] if loc and loc[0] == "messages" else loc[:1]
