# SPDX-License-Identifier: Apache-2.0
"""The model that is served: what a server has, and how requests for it are prepared."""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxcp.inference import Engine
from jaxcp.inference.request import Request
from jaxcp.inference.sampling import Sampling
from jaxcp.serve.answers import Answers
from jaxcp.serve.config import ServeConfig
from jaxcp.serve.conversations import Conversations
from jaxcp.serve.errors import Refusal, wrong
from jaxcp.serve.logprobs import TokenTexts
from jaxcp.serve.options import as_asked
from jaxcp.serve.record import Metrics
from jaxcp.serve.worker import Worker
from jaxcp.text.tokenizer import Tokenizer


@dataclasses.dataclass(kw_only=True)
class Served:
    """Everything that routes need. `workshop` is one thread: there prompts become tokens, schemas
    grammars, and bodies requests, in the order in which they came."""

    engine: Engine
    tokenizer: Tokenizer
    config: ServeConfig
    worker: Worker
    metrics: Metrics
    conversations: Conversations
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    workshop: ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: ThreadPoolExecutor(1, "jaxcp-workshop")
    )

    @functools.cached_property
    def texts(self) -> TokenTexts:
        """Bytes of tokens, for log-probabilities."""
        return TokenTexts(self.tokenizer)

    @property
    def chat(self) -> Any:
        """The checkpoint's chat format (`jaxcp.text.chat`); None where it has none."""
        return self.tokenizer.chat

    async def prepare(self, work: Callable[[], Any]) -> Any:
        """Run `work` in the workshop."""
        return await asyncio.get_running_loop().run_in_executor(self.workshop, work)

    def check_model(self, name: str | None) -> None:
        """Raise Refusal where a client asks for another model."""
        if name is not None and name != self.config.name:
            raise Refusal(
                404,
                f"the model {name[:100]!r} is not here; {self.config.name!r} is",
                code="model_not_found",
                param="model",
            )

    def requests(self, ids: list[int], sampling: Sampling) -> list[Request]:
        """Requests of the engine, one for each answer.

        Raises:
          Refusal: they can never fit, or ask for what cannot be done.
        """
        return as_asked(self.engine.requests, ids, sampling)

    def room(self, prompt_tokens: int, wanted: int | None, default: int, param: str) -> int:
        """Tokens that an answer may have.

        Raises:
          Refusal: the prompt, or what is wanted behind it, is longer than the context.
        """
        left = self.engine.max_len - prompt_tokens + 1
        if wanted is not None and wanted < 1:
            raise wrong(f"{param} must be at least 1; got {wanted}", param)
        if left < (wanted or 1):
            raise wrong(
                f"the context holds {self.engine.max_len} tokens; the prompt has {prompt_tokens}, "
                f"and up to {wanted or 1} are wanted",
                param,
                code="context_length_exceeded",
            )
        return min(left, default) if wanted is None else wanted

    def submit(self, requests: list[Request], name: str, *, named: bool) -> Answers:
        """Queue requests; see `Worker.submit`.

        Args:
          name: of the conversation.
          named: whether the client gave the name; one without is found by its tokens.
        """

        def queued():
            for number, request in enumerate(requests):
                own = f"{name}/{number}" if number else name
                self.conversations.begin(own, request, named=named)

        return self.worker.submit(requests, queued)
