# SPDX-License-Identifier: Apache-2.0
"""Server-sent events as bytes."""

from typing import Any

from jaxcp.serve.bodies import encode

DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's streams."""


def data(value: Any) -> bytes:
    """An event with JSON for its data; JSON has no line breaks."""
    return b"data: " + encode(value) + b"\n\n"


def named(event: str, value: Any) -> bytes:
    """The same with a name, as Anthropic's clients and those of responses read it."""
    return b"event: " + event.encode() + b"\n" + data(value)
