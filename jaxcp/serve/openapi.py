# SPDX-License-Identifier: Apache-2.0
"""The document at `/openapi.json`, made of the structs by which bodies are read."""

from collections.abc import Mapping
from typing import Any

import msgspec

ERRORS = {
    "400": "A field is wrong, unknown or not supported; `param` names it",
    "401": "No known API key",
    "403": "The server listens on loopback, and was called by another name",
    "404": "No such model",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not said to be JSON",
    "429": "Too many answers run and wait",
    "500": "A step of the engine failed",
    "503": "The server ends",
    "504": "The answer took too long",
}
OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
ANSWERS = {
    "/v1/completions": ("Go on with a text", "text_completion"),
    "/v1/chat/completions": ("Go on with a conversation", "chat.completion"),
    "/v1/responses": ("Go on with a conversation; nothing is stored", "response"),
    "/v1/messages": ("Go on with a conversation, in Anthropic's form", "message"),
    "/v1/messages/count_tokens": ("Count the tokens of a conversation", None),
}
READING = {
    "/v1/models": "The model that is served",
    "/v1/models/{name}": "One model",
    "/v1/sessions": "Conversations of which the pool holds pages: where, and how large",
    "/v1/pool": "The pages of the pool, shard by shard: whose they are, and how many share them",
    "/health": "Whether answers are made",
    "/metrics": "Counters, as Prometheus reads them",
    "/openapi.json": "This document",
    "/": "A page to talk on",
}


def document(bodies: Mapping[str, type], name: str) -> dict[str, Any]:
    """Write the document.

    Args:
      bodies: the struct of the body of each path that takes one.
      name: of the model.
    """
    schemas, components = msgspec.json.schema_components(
        bodies.values(), ref_template="#/components/schemas/{name}"
    )
    components |= {"OpenAIError": OPENAI_ERROR, "AnthropicError": ANTHROPIC_ERROR}
    schema_of = dict(zip(bodies, schemas, strict=True))
    paths = {path: {"post": _posting(path, schema_of[path])} for path in bodies}
    paths |= {path: {"get": _reading(path)} for path in READING}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"jaxcp serves {name}", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _posting(path: str, schema: Any) -> dict[str, Any]:
    summary, kind = ANSWERS[path]
    content: dict[str, Any] = {"application/json": {"schema": _answer(kind)}}
    if kind is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "The answer", "content": content}, **_errors(path)},
    }


def _answer(kind: str | None) -> dict[str, Any]:
    if kind is None:
        return {"type": "object", "required": ["input_tokens"]}
    tag = "type" if kind == "message" else "object"
    return {"type": "object", "required": ["id", tag], "properties": {tag: {"const": kind}}}


def _reading(path: str) -> dict[str, Any]:
    kinds = {"/metrics": "text/plain", "/": "text/html"}
    content: dict[str, Any] = {kinds.get(path, "application/json"): {}}
    reading: dict[str, Any] = {
        "summary": READING[path],
        "responses": {"200": {"description": READING[path], "content": content}, **_errors(path)},
    }
    if "{name}" in path:
        place = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        reading["parameters"] = [place]
    return reading


def _errors(path: str) -> dict[str, Any]:
    name = "AnthropicError" if path.startswith("/v1/messages") else "OpenAIError"
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {
        status: {"description": said, "content": content}
        for status, said in ERRORS.items()
        if path not in READING or status in ("401", "403", "404", "500", "503")
    }
