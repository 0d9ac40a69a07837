"""The ASGI application: routes, errors, and what happens at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from functools import wraps
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvedit.serving.openai.answering import Answerer
from kvedit.serving.openai.guard import LOOPBACK, Guard
from kvedit.serving.openai.limits import Limits
from kvedit.serving.openai.memories import Memories
from kvedit.serving.openai.problems import Problem, problem_of
from kvedit.serving.openai.replies import ChatFormat, CompletionFormat
from kvedit.serving.openai.schema import ChatAsked, CompletionAsked
from kvedit.serving.openai.service import Service

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvedit.store import Store

__all__ = ["create_app"]

Handler = Callable[[Request], Awaitable[Response]]


def create_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: Store,
    *,
    name: str | None = None,
    limits: Limits | None = None,
    key: str | None = None,
    hosts: Collection[str] | None = LOOPBACK,
    strict: bool = True,
) -> Starlette:
    """Returns an OpenAI-compatible endpoint over the memories of a store, as an ASGI application.

    Its threads begin with the first request and end with the application's lifespan.

    Args:
        model: the model that made the memories.
        tokenizer: its tokenizer.
        store: the store; it stays the caller's to close.
        name: what the plain model is called; None for the name that it was loaded by.
        limits: what the endpoint takes on; None for the defaults.
        key: an API key that clients must send, or None.
        hosts: names that requests may address it by; None for any.
        strict: whether the compatibility gate and the model's position limit hold.

    Raises:
        InvalidArgument: if a limit is too small.
    """
    chosen = Limits() if limits is None else limits
    memories = Memories(store, name or str(model.name_or_path), chosen.cache)
    service = Service(Answerer(model, tokenizer, memories, strict), chosen)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await service.close()

    return Starlette(
        routes=_routes(service),
        middleware=[Middleware(Guard, hosts=hosts, key=key, body=chosen.body)],
        exception_handlers={HTTPException: _not_routed},
        lifespan=lifespan,
    )


def _routes(service: Service) -> list[Route]:
    async def completions(request: Request) -> Response:
        return await service.respond(request, CompletionAsked, CompletionFormat)

    async def chat(request: Request) -> Response:
        return await service.respond(request, ChatAsked, ChatFormat)

    async def models(request: Request) -> Response:
        rows = await service.look_up(service.memories.listed)
        return JSONResponse({"object": "list", "data": rows})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(await service.look_up(service.memories.described, name))

    async def health(request: Request) -> Response:
        line = {"running": service.line.running, "waiting": service.line.waiting}
        model = service.memories.model
        return JSONResponse({"status": "ok", "model": model} | line | service.memories.usage())

    return [
        Route("/v1/completions", _telling(completions), methods=["POST"]),
        Route("/v1/chat/completions", _telling(chat), methods=["POST"]),
        Route("/v1/models", _telling(models)),
        Route("/v1/models/{name:path}", _telling(model)),
        Route("/health", _telling(health)),
    ]


def _telling(handler: Handler) -> Handler:
    """Returns a handler whose errors become responses."""

    @wraps(handler)
    async def telling(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            return _shown(problem_of(error))

    return telling


async def _not_routed(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    known = "POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /health"
    problem = Problem(status, f"{request.method} {request.url.path}: this server has {known}")
    reply = _shown(problem)
    reply.headers.update(getattr(error, "headers", None) or {})
    return reply


def _shown(problem: Problem) -> JSONResponse:
    return JSONResponse(problem.body(), problem.status, headers=problem.headers)
