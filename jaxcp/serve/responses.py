# SPDX-License-Identifier: Apache-2.0
"""OpenAI's `/v1/responses`, without a store: a conversation in, items of output out."""

import dataclasses
import functools
from collections.abc import AsyncIterator, Iterator
from typing import Any

from jaxcp.serve.blocks import Block, Blocks, Step
from jaxcp.serve.errors import Refusal
from jaxcp.serve.events import Event, Usage
from jaxcp.serve.form import Form
from jaxcp.serve.responses_request import ResponsesRequest
from jaxcp.serve.sse import named

PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


@dataclasses.dataclass(kw_only=True)
class Responses(Form):
    """The answer to one request, in the form of responses."""

    ask: ResponsesRequest
    _events: int = 0

    def check(self) -> None:
        self.ask.check()

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        blocks, begun = Blocks(), False
        try:
            async for event in events:
                if not begun:
                    begun = True
                    for kind in ("response.created", "response.in_progress"):
                        yield self._event(kind, response=self._body(blocks, "in_progress"))
                for step in blocks.take(event):
                    for kind, fields in self._changes(step):
                        yield self._event(kind, **fields)
        except Refusal as refusal:
            if not begun:
                raise
            error = {"code": "server_error", "message": refusal.message}
            body = self._body(blocks, "failed") | {"error": error}
            yield self._event("response.failed", response=body)
            return
        status = self._status(blocks)
        yield self._event(f"response.{status}", response=self._body(blocks, status))

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """The body of an answer that is complete."""
        blocks = Blocks()
        async for event in events:
            for _ in blocks.take(event):
                pass
        return self._body(blocks, self._status(blocks))

    def _status(self, blocks: Blocks) -> str:
        return "incomplete" if blocks.reason == "length" else "completed"

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return named(kind, event)

    def _changes(self, step: Step) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the names and fields of the events that say what an item does."""
        block, item = step.block, functools.partial(self._item, step.block)
        place = {"output_index": block.index, "item_id": self._item_id(block)}
        part = place | {"content_index": 0}
        more: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        text = "reasoning_text" if block.kind == "reasoning" else "output_text"
        if step.what == "begin":
            begun = {"output_index": block.index, "item": item("in_progress", text="")}
            yield "response.output_item.added", begun
            if block.kind == "text":
                yield "response.content_part.added", part | {"part": _part("")}
        elif step.what == "more":
            if block.kind == "call":
                yield "response.function_call_arguments.delta", place | {"delta": step.text}
            else:
                yield f"response.{text}.delta", part | {"delta": step.text} | more
        else:
            if block.kind == "call":
                done = {"arguments": block.text, "name": block.name}
                yield "response.function_call_arguments.done", place | done
            else:
                yield f"response.{text}.done", part | {"text": block.text} | more
            if block.kind == "text":
                yield "response.content_part.done", part | {"part": _part(block.text)}
            ended = {"output_index": block.index, "item": item("completed", text=block.text)}
            yield "response.output_item.done", ended

    def _item_id(self, block: Block) -> str:
        return f"{PREFIXES[block.kind]}_{self.id.removeprefix('req-')}_{block.index}"

    def _item(self, block: Block, status: str, *, text: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.kind == "call":
            call = {"call_id": block.id, "name": block.name, "arguments": text}
            return item | {"type": "function_call", **call}
        if block.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": text}] if text else []
            return item | {"type": "reasoning", "summary": [], "content": content}
        content = [_part(text)] if text or status == "completed" else []
        return item | {"type": "message", "role": "assistant", "content": content}

    def _body(self, blocks: Blocks, status: str) -> dict[str, Any]:
        ended = status in ("completed", "incomplete")
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": f"resp_{self.id.removeprefix('req-')}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.served.config.name,
            "output": [self._item(x, "completed", text=x.text) for x in blocks.all],
            "error": None,
            "incomplete_details": cut,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": _usage(self.job.usage) if ended else None,
            **self.ask.said_again(),
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.generated,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.generated,
    }
