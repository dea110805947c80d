# SPDX-License-Identifier: Apache-2.0
"""Reads the body of a request: so large, so slow, of such fields, or refused with a reason."""

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from jaxcp.serve.errors import Refusal, not_done, wrong

T = TypeVar("T")
STATELESS = "nothing is stored: send the whole conversation, and store=false or nothing"
INSTEAD = {
    "store": STATELESS,
    "previous_response_id": STATELESS,
    "conversation": STATELESS,
    "service_tier": 'there is one: "auto", "default", or nothing',
}
"""Advice, by the field, where a value is one that other servers take."""


async def read_body(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """Read a body of JSON.

    Raises:
      Refusal: it is no JSON by its headers, too large, or takes too long.
      ClientDisconnect: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(
            415, f"needed the header Content-Type: application/json; got {kind[:80] or 'none'}"
        )
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise Refusal(415, f"needed a body without Content-Encoding; got {coding[:80]}")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {seconds:g} s") from error
    return bytes(body)


def decode(body: bytes, kind: type[T]) -> T:
    """Make a `msgspec.Struct` of a body.

    Raises:
      Refusal: it is no JSON, or has fields that are unknown, missing or of a wrong type; the
        message names the first of them.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        field = _field(str(error))
        if field in INSTEAD and "unknown field" not in str(error):
            raise not_done(field, INSTEAD[field]) from error
        raise wrong(f"{error}", field) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise wrong(f"the body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise wrong("the body is nested too deep", code="invalid_json") from error


def encode(value: Any) -> bytes:
    """Write JSON; numbers that are none become null."""
    return msgspec.json.encode(value)


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(413, f"a body has at most {max_bytes:,} bytes", code="request_too_large")


def _field(message: str) -> str | None:
    """The field that an error of msgspec names, such as `messages[0].role`."""
    unknown = re.search(r"(?:unknown|required) field `([^`]+)`", message)
    place = re.search(r"- at `\$\.?([^`]*)`$", message)
    parts = [found.group(1) for found in (place, unknown) if found and found.group(1)]
    return ".".join(parts) or None


__all__ = ["ClientDisconnect", "decode", "encode", "read_body"]
