# SPDX-License-Identifier: Apache-2.0
"""Options of sampling as clients of OpenAI's interface send them, and what becomes of them."""

import dataclasses
import re
import secrets
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from jaxcp.inference import Sampling
from jaxcp.serve.errors import not_done, wrong
from jaxcp.text.generation import Defaults

MOST_STOPS = 16
MOST_BIASES = 1024
Strings = str | list[str]
SENT_AS = {"stop_tokens": "stop_token_ids", "variables": "chat_template_kwargs"}
"""Fields of a request, by the names that they have within."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Options(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that completions and chats have in common; the last ones are not OpenAI's.

    `user`, `metadata` and `safety_identifier` are taken and mean nothing here.
    """

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: Strings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    regex: str | None = None
    grammar: str | None = None

    @property
    def usage_wanted(self) -> bool:
        """True if a stream ends with a chunk of usage."""
        options = self.stream_options
        return options is not None and bool(options.include_usage)

    def stops(self) -> list[str]:
        """The stop strings.

        Raises:
          Refusal: there are too many, or one is empty.
        """
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > MOST_STOPS or not all(given):
            raise wrong(f"stop takes up to {MOST_STOPS} strings with a character at least", "stop")
        return given

    def check(self, max_choices: int) -> None:
        """Raise Refusal where fields contradict each other, or are too many."""
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options is for stream=true alone", "stream_options")
        if self.n is not None and not 1 <= self.n <= max_choices:
            raise wrong(f"n must be 1 to {max_choices} here; got {self.n}", "n")
        if self.prompt_cache_retention not in (None, "in-memory", "in_memory"):
            raise not_done("prompt_cache_retention", 'prefixes are kept "in_memory"')

    def sampling(self, *, ends: Sequence[int], defaults: Defaults, **given: Any) -> Sampling:
        """Options of the engine.

        Args:
          ends: tokens that end an answer of this model.
          defaults: the advice of the checkpoint, for what the client leaves out.
          given: fields of `Sampling` that the caller has worked out.
        Raises:
          Refusal: a value is out of its range.
        """
        advice = {"temperature": 1.0} | _given(dataclasses.asdict(defaults))
        fields = advice | {
            "seed": secrets.randbits(32) if self.seed is None else self.seed % 2**32,
            "logit_bias": _biases(self.logit_bias or {}),
            "n": self.n or 1,
            "stop_tokens": [*(() if self.ignore_eos else ends), *(self.stop_token_ids or ())],
        }
        for name in (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "regex", "grammar",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        if fields.get("top_k") in (0, -1):  # as others write that there is none
            del fields["top_k"]
        return as_asked(Sampling, **fields | given)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def as_asked(make: Any, *arguments: Any, **options: Any) -> Any:
    """Call what raises ValueError for options that are wrong.

    Raises:
      Refusal: instead, with the field that the message begins with.
    """
    try:
        return make(*arguments, **options)
    except (ValueError, ModuleNotFoundError, NotImplementedError) as error:
        field = re.match(r"[a-z]\w*", str(error))
        name = "" if field is None else field.group()
        message = SENT_AS.get(name, name) + str(error)[len(name) :]
        known = name in options or name in SENT_AS
        raise wrong(message, SENT_AS.get(name, name) if known else None) from error


def _biases(given: dict[str, float]) -> dict[int, float]:
    if len(given) > MOST_BIASES:
        raise wrong(f"logit_bias has up to {MOST_BIASES} ids; got {len(given)}", "logit_bias")
    for name, bias in given.items():
        if not re.fullmatch(r"\d{1,9}", name, re.ASCII) or not -100 <= bias <= 100:
            raise wrong(
                f"logit_bias maps ids of tokens to -100..100; got {name[:40]!r}: {bias}",
                "logit_bias",
            )
    return {int(name): bias for name, bias in given.items()}
