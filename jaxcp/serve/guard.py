# SPDX-License-Identifier: Apache-2.0
"""Stands before all routes: who may ask, by which name, and a record of everything."""

import hashlib
import hmac
import re
import uuid
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from jaxcp.serve.bodies import encode
from jaxcp.serve.config import ServeConfig
from jaxcp.serve.errors import Refusal
from jaxcp.serve.record import LOG, Metrics, Record
from jaxcp.serve.stream import Gone

OPEN_TO_ALL = ("/", "/health")
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "")
ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
CLIENT_LEFT = 499  # nobody reads it; the log does


class Guard:
    """ASGI middleware.

    Pages of other origins reach a server on loopback through the browser of whoever sits there:
    there is no CORS, and a server that listens on loopback answers to names of loopback alone.
    """

    def __init__(self, app: Any, config: ServeConfig, metrics: Metrics):
        self._app, self._config, self._metrics = app, config, metrics
        self._keys = [_digest(key) for key in config.api_keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        record = Record(id=_id_of(headers), metrics=self._metrics, method=scope["method"])
        scope["state"] = {**scope.get("state", {}), "record": record}

        async def recorded(message):
            if message["type"] == "http.response.start":
                record.status = message["status"]
                own = [(b"x-request-id", record.id.encode())]
                message = message | {"headers": [*message.get("headers", []), *own]}
            await send(message)

        try:
            await self._answer(scope, headers, receive, recorded, record)
        finally:
            record.close()

    async def _answer(self, scope, headers, receive, send, record) -> None:
        try:
            self._admit(scope["path"], headers)
            await self._app(scope, receive, send)
        except Refusal as refusal:
            record.error = refusal.code or refusal.type
            await error_response(scope["path"], refusal)(scope, receive, send)
        except (Gone, ClientDisconnect):
            record.left = True
            if not record.status:
                record.status = CLIENT_LEFT
        except Exception as error:
            record.error = type(error).__name__
            LOG.exception("request %s failed", record.id)
            if record.status:
                raise
            broken = Refusal(500, f"the server has failed; request {record.id}", code="internal")
            await error_response(scope["path"], broken)(scope, receive, send)

    def _admit(self, path: str, headers: dict[str, bytes]) -> None:
        host = headers.get("host", b"").decode("latin-1")
        if self._config.is_local and re.sub(r":\d*$", "", host).lower() not in LOCAL_NAMES:
            raise Refusal(403, "this server answers to localhost alone; see --host", code="host")
        if self._keys and path not in OPEN_TO_ALL and not self._is_known(_key_of(headers)):
            raise Refusal(
                401,
                "needed a known API key, as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="invalid_api_key",
            )

    def _is_known(self, key: bytes) -> bool:
        """Compare with every key, in the same time whatever matches."""
        given = _digest(key)
        return any([hmac.compare_digest(given, known) for known in self._keys])


def error_response(path: str, refusal: Refusal) -> Response:
    """An error as the clients of this path read it."""
    body = refusal.anthropic() if path.startswith("/v1/messages") else refusal.openai()
    return Response(
        encode(body), refusal.status, headers=refusal.headers, media_type="application/json"
    )


def _digest(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def _key_of(headers: dict[str, bytes]) -> bytes:
    scheme, _, key = headers.get("authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else headers.get("x-api-key", b"").strip()


def _id_of(headers: dict[str, bytes]) -> str:
    given = headers.get("x-request-id", b"").decode("latin-1")
    return given if ID.fullmatch(given) else f"req-{uuid.uuid4().hex[:24]}"
