# SPDX-License-Identifier: Apache-2.0
"""One streamed request to a server of OpenAI's interface, with the times at which it answers."""

import dataclasses
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

Endpoint = Literal["completions", "chat"]


@dataclasses.dataclass(kw_only=True)
class Answered:
    """A request and what came of it. Times are seconds since the request was due."""

    conversation: int
    turn: int
    due: float = 0.0
    """Seconds since the load began."""
    pieces: list[float] = dataclasses.field(default_factory=list)
    """When each piece of the answer came."""
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    error: str | None = None
    """Kind of failure; None where the answer is complete."""
    text: str = dataclasses.field(default="", repr=False)

    @property
    def to_first(self) -> float | None:
        """Seconds to the first piece; None where none came."""
        return self.pieces[0] if self.pieces else None

    @property
    def gaps(self) -> list[float]:
        """Seconds from each piece to the next."""
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def per_token(self) -> float | None:
        """Seconds a token after the first piece, in the mean; None of an answer of one token."""
        if len(self.pieces) < 2 or self.answer_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.answer_tokens - 1)


def new_client(url: str, key: str | None, timeout: float) -> Any:
    """Make the HTTP client of a load, which keeps as many connections as it takes.

    Raises:
      ModuleNotFoundError: httpx2 is not installed.
    """
    library = _library()
    return library.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=timeout,
        limits=library.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    )


def _library() -> Any:
    try:
        import httpx2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a load on a server needs httpx2, which is not installed: pip install 'jaxcp[serve]'"
        ) from error
    return httpx2


async def served_model(client: Any) -> dict[str, Any]:
    """Ask a server for its first model, as `/v1/models` describes it.

    Raises:
      ValueError: there is no such server, or it has no model.
    """
    try:
        reply = await client.get("/v1/models")
        models = reply.json()["data"] if reply.status_code == 200 else []
    except (_library().HTTPError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"needed the address of a server of OpenAI's interface, as http://127.0.0.1:8000; at "
            f"{client.base_url} /v1/models fails: {error or type(error).__name__}"
        ) from error
    if not models:
        raise ValueError(
            f"{client.base_url}/v1/models names no model: {reply.status_code} {reply.text:.200}"
        )
    return models[0]


async def ask(
    client: Any, path: str, body: dict[str, Any], answered: Answered, began: float
) -> None:
    """Send a request and read its stream to the end; whatever happens is in `answered`.

    Args:
      began: when it was due, on the monotonic clock.
    """
    library = _library()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", path, json=body) as reply:
            if reply.status_code != 200:
                answered.error = _refused(reply.status_code, await reply.aread())
            else:
                await _read(reply.aiter_lines(), began, answered)
    except library.TimeoutException:
        answered.error = "timeout"
    except library.HTTPError as error:
        answered.error = type(error).__name__
    except ValueError:
        answered.error = "stream: an event is not JSON"
    answered.end = time.monotonic() - began


async def _read(lines: AsyncIterator[str], began: float, answered: Answered) -> None:
    done = False
    async for line in lines:
        if not line.startswith("data:"):
            continue
        text = line.removeprefix("data:").strip()
        if done := text == "[DONE]":
            break
        chunk = json.loads(text)
        if "error" in chunk:
            answered.error = f"stream: {_code(chunk)}"
            return
        _take(chunk, time.monotonic() - began, answered)
    if not done:
        answered.error = "stream: it ended too early"


def _take(chunk: dict[str, Any], now: float, answered: Answered) -> None:
    for choice in chunk.get("choices") or ():
        if said_in(choice):
            answered.pieces.append(now)
            answered.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    if usage := chunk.get("usage"):
        answered.prompt_tokens = usage.get("prompt_tokens") or 0
        answered.answer_tokens = usage.get("completion_tokens") or 0
        details = usage.get("prompt_tokens_details") or {}
        answered.cached_tokens = details.get("cached_tokens") or 0


def said_in(choice: dict[str, Any]) -> bool:
    """Tell whether a choice of a chunk has a piece of the answer: text, thinking or a call."""
    delta = choice.get("delta") or {}
    names = ("content", "reasoning", "reasoning_content", "tool_calls")
    return bool(choice.get("text")) or any(delta.get(name) for name in names)


def _refused(status: int, body: bytes) -> str:
    try:
        fields = json.loads(body)
    except ValueError:
        return f"{status}"
    return f"{status} {_code(fields)}".strip()


def _code(fields: Any) -> str:
    error = fields.get("error") if isinstance(fields, dict) else None
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or error.get("message") or "")[:80]
    return str(error or "")[:80]


def request_of(
    endpoint: Endpoint, model: str, said: Sequence[str], tokens: int, *, ignore_eos: bool
) -> tuple[str, dict[str, Any]]:
    """Make the path and the body of a request.

    Args:
      said: what the user and the model have said in turn; the last is the user's.
      tokens: of the answer.
    """
    common: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": 0}
    if ignore_eos:
        common["ignore_eos"] = True
    if endpoint == "completions":
        return "/v1/completions", common | {"prompt": "".join(said)}
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return "/v1/chat/completions", common | {"messages": messages}
