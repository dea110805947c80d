# SPDX-License-Identifier: Apache-2.0
"""The routes, and what each of them does."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxcp.serve.bodies import decode, encode, read_body
from jaxcp.serve.chat import ChatCompletions, ChatRequest
from jaxcp.serve.completions import CompletionRequest, Completions
from jaxcp.serve.errors import Refusal
from jaxcp.serve.events import happening
from jaxcp.serve.guard import Guard, error_response
from jaxcp.serve.messages import Messages, MessagesRequest, count_tokens
from jaxcp.serve.model import Served
from jaxcp.serve.openapi import document
from jaxcp.serve.page import page
from jaxcp.serve.responses import Responses
from jaxcp.serve.responses_request import ResponsesRequest
from jaxcp.serve.sse import data, named
from jaxcp.serve.stream import EventStream, unless_gone

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def application(served: Served) -> Any:
    """The server as an ASGI application."""
    routes = Routes(served)
    answers = [
        ("/v1/completions", CompletionRequest, Completions),
        ("/v1/chat/completions", ChatRequest, ChatCompletions),
        ("/v1/responses", ResponsesRequest, Responses),
        ("/v1/messages", MessagesRequest, Messages),
    ]
    return Starlette(
        routes=[
            *(
                Route(path, routes.answering(path, fields, form), methods=["POST"])
                for path, fields, form in answers
            ),
            Route("/v1/messages/count_tokens", routes.count, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/sessions", routes.sessions),
            Route("/v1/pool", routes.pool),
            Route("/health", routes.health),
            Route("/openapi.json", routes.openapi(answers)),
            Route("/", routes.page),
            Route("/metrics", routes.metrics),
        ],
        middleware=[Middleware(Guard, config=served.config, metrics=served.metrics)],
        exception_handlers={HTTPException: _http_error},
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer where there is no route in the form that clients read."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return error_response(request.url.path, Refusal(error.status_code, message))


class Routes:
    """The endpoints of all routes."""

    def __init__(self, served: Served):
        self._served = served

    def answering(self, path: str, fields: Any, form: Any) -> Callable[[Request], Awaitable[Any]]:
        """The endpoint of a path that makes answers: reads `fields`, writes what `form` does."""
        served, config = self._served, self._served.config

        async def endpoint(request: Request) -> Any:
            record = request.state.record
            record.route = path
            served.worker.check_open()
            body = await read_body(
                request, max_bytes=config.max_body_bytes, seconds=config.read_seconds
            )
            ask = await served.prepare(lambda: decode(body, fields))
            answer = form(served=served, ask=ask, id=record.id)
            await unless_gone(request.receive, served.prepare(answer.prepare))
            if config.log_text:
                record.texts["body"] = body.decode("utf-8", "replace")
            answers = served.submit(
                answer.job.requests, answer.name, named=answer.name != record.id
            )
            events = happening(
                served.worker, answers, answer.job, record,
                seconds=config.request_seconds, prepare=served.prepare,
            )  # fmt: skip

            async def end():
                await events.aclose()
                served.worker.cancel(answers)  # which `events` does not do if it has not begun

            if ask.stream:
                return EventStream(
                    answer.chunks(events),
                    write_seconds=config.write_seconds,
                    error_chunk=lambda refusal: _error_chunk(path, refusal, record),
                    error_response=lambda refusal: _error_response(path, refusal, record),
                    on_end=end,
                )
            try:
                return _json(await unless_gone(request.receive, answer.whole(events)))
            finally:
                await end()

        return endpoint

    async def count(self, request: Request) -> Response:
        request.state.record.route = "/v1/messages/count_tokens"
        config = self._served.config
        body = await read_body(
            request, max_bytes=config.max_body_bytes, seconds=config.read_seconds
        )
        counted = self._served.prepare(
            lambda: count_tokens(self._served, decode(body, MessagesRequest))
        )
        return _json(await unless_gone(request.receive, counted))

    def openapi(self, answers: Any) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint of the document of all these."""
        bodies = {path: fields for path, fields, _ in answers}
        bodies["/v1/messages/count_tokens"] = MessagesRequest
        whole = _json(document(bodies, self._served.config.name))

        async def endpoint(request: Request) -> Response:
            request.state.record.route = "/openapi.json"
            return whole

        return endpoint

    async def page(self, request: Request) -> Response:
        request.state.record.route = "/"
        return page()

    async def models(self, request: Request) -> Response:
        request.state.record.route = "/v1/models"
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        request.state.record.route = "/v1/models/{name}"
        self._served.check_model(request.path_params["name"])
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        served = self._served
        return {
            "id": served.config.name,
            "object": "model",
            "created": served.created,
            "owned_by": "jaxcp",
            "max_model_len": served.engine.max_len,
            "chat": served.chat is not None,
            "thinking_levels": [*served.chat.thinking_levels] if served.chat is not None else [],
        }

    async def sessions(self, request: Request) -> Response:
        request.state.record.route = "/v1/sessions"
        held = await self._served.worker.ask(self._served.conversations.held)
        return _json({"object": "list", "data": held})

    async def pool(self, request: Request) -> Response:
        request.state.record.route = "/v1/pool"
        return _json(await self._served.worker.ask(self._served.conversations.picture))

    async def health(self, request: Request) -> Response:
        request.state.record.route = "/health"
        worker = self._served.worker
        load, now = worker.load, time.monotonic()
        state = "ok" if worker.refusing is None else "ending"
        body = {
            "status": "broken" if worker.broken is not None else state,
            "running": load.running,
            "waiting": load.waiting,
            "step_failures": load.failures,
            "step_seconds": None if load.began is None else round(now - load.began, 3),
        }
        return _json(body, 200 if body["status"] == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        request.state.record.route = "/metrics"
        return Response(self._served.metrics.text(self._served.worker), media_type=PROMETHEUS)


def _json(body: Any, status: int = 200) -> Response:
    return Response(encode(body), status, media_type="application/json")


def _error_chunk(path: str, refusal: Refusal, record: Any) -> bytes:
    record.error = refusal.code or refusal.type
    if path == "/v1/responses":
        return named("error", {"type": "error", "sequence_number": 0, **_flat(refusal)})
    if path.startswith("/v1/messages"):
        return named("error", refusal.anthropic())
    return data(refusal.openai())


def _flat(refusal: Refusal) -> dict[str, Any]:
    return {"code": refusal.code, "message": refusal.message, "param": refusal.param}


def _error_response(path: str, refusal: Refusal, record: Any) -> Response:
    record.error = refusal.code or refusal.type
    return error_response(path, refusal)
