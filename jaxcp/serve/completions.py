# SPDX-License-Identifier: Apache-2.0
"""`/v1/completions`: text or ids in, their continuation out."""

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from jaxcp.inference.logprobs import TokenLogProbs
from jaxcp.serve.errors import not_done, wrong
from jaxcp.serve.events import End, Event, Job, Text, Usage
from jaxcp.serve.form import Form
from jaxcp.serve.logprobs import of_prompt
from jaxcp.serve.options import Options
from jaxcp.serve.reading import PlainReader
from jaxcp.serve.sse import DONE, data

MOST_PROMPTS = 64
DEFAULT_TOKENS = 16  # as of OpenAI


class CompletionRequest(Options, forbid_unknown_fields=True, kw_only=True):
    """Body of `/v1/completions`."""

    prompt: str | list[Any]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    suffix: str | None = None

    def check(self, max_choices: int) -> None:
        super().check(max_choices)
        if self.suffix:
            raise not_done("suffix")
        if self.best_of not in (None, self.n or 1):
            raise not_done("best_of", "ask for n answers and choose")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise wrong(f"logprobs must be 0 to 20; got {self.logprobs}", "logprobs")


@dataclasses.dataclass(kw_only=True)
class Completions(Form):
    """The answer to one request, in OpenAI's form."""

    ask: CompletionRequest
    of_prompt: tuple[TokenLogProbs, ...] = ()
    """Log-probabilities of its tokens, where the prompt is said again with them."""

    def check(self) -> None:
        self.ask.check(self.served.config.max_choices)

    def make(self) -> Job:
        served, ask = self.served, self.ask
        ids, echo = self._prompt()
        tokens = served.room(len(ids), ask.max_tokens, DEFAULT_TOKENS, "max_tokens")
        stop = ask.stops()
        sampling = ask.sampling(
            ends=served.engine.stop_tokens, max_new_tokens=tokens, stop=stop,
            logprobs=ask.logprobs, defaults=served.tokenizer.defaults,
        )  # fmt: skip
        requests = served.requests(ids, sampling)
        if ask.echo and ask.logprobs is not None:
            self.of_prompt = of_prompt(ids, served.engine.score(ids, best=ask.logprobs))
        readers = [PlainReader(served.tokenizer, stop, echo) for _ in requests]
        return Job(requests=requests, readers=readers)

    def _prompt(self) -> tuple[list[int], str]:
        """Ids, and the text that is said again where that is wanted."""
        prompt, engine = self.ask.prompt, self.served.engine
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, list) and any(not isinstance(x, int) for x in prompt):
            raise not_done("a prompt of several texts", "send them as requests of their own")
        if not prompt:
            raise wrong("the prompt is empty; send at least one token", "prompt")
        try:
            ids = engine.ids(prompt)
        except ValueError as error:
            raise wrong(str(error), "prompt") from error
        text = prompt if isinstance(prompt, str) else self.served.tokenizer.decode(ids)
        return ids, text if self.ask.echo else ""

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        offsets: dict[int, int] = {}
        async for event in events:
            choice = self._choice(event, offsets)
            if choice is not None:
                yield data(self._body([choice], None))
        if self.ask.usage_wanted:
            yield data(self._body([], self.job.usage))
        yield DONE

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """The body of an answer that is complete."""
        choices: dict[int, dict[str, Any]] = {}
        offsets: dict[int, int] = {}
        async for event in events:
            part = self._choice(event, offsets)
            if part is not None:
                choices[event.choice] = _added(choices.get(event.choice), part)
        return self._body([choices[i] for i in sorted(choices)], self.job.usage)

    def _choice(self, event: Event, offsets: dict[int, int]) -> dict[str, Any] | None:
        choice = {"index": event.choice, "text": "", "logprobs": None, "finish_reason": None}
        if isinstance(event, Text):
            begin = offsets.get(event.choice, 0)
            if self.ask.logprobs is not None:
                before = () if event.choice in offsets else self.of_prompt
                choice["logprobs"] = self.served.texts.completion((*before, *event.logprobs), begin)
            offsets[event.choice] = begin + len(event.text)
            return choice | {"text": event.text}
        if isinstance(event, End):
            return choice | {"finish_reason": event.reason}
        return None

    def _body(self, choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.served.config.name,
            "choices": choices,
            "usage": None if usage is None else usage_of(usage),
        }


def usage_of(usage: Usage) -> dict[str, Any]:
    """Tokens as OpenAI counts them: the prompt once, however many answers it has."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.generated,
        "total_tokens": usage.prompt + usage.generated,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def _added(whole: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
    if whole is None:
        return part
    whole["text"] += part["text"]
    whole["finish_reason"] = part["finish_reason"]
    if whole["logprobs"] is None:
        whole["logprobs"] = part["logprobs"]
    elif part["logprobs"] is not None:
        for name, values in part["logprobs"].items():
            whole["logprobs"][name] += values
    return whole
