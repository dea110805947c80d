# SPDX-License-Identifier: Apache-2.0
"""Makes requests of prompts and options, or says what this model and tokenizer cannot do."""

import functools
import weakref
from collections.abc import Collection, Iterator, Sequence, Set
from typing import Any

from jaxcp.inference.batch import STOPS
from jaxcp.inference.checks import token_ids
from jaxcp.inference.guesses import Guesses
from jaxcp.inference.output import Output
from jaxcp.inference.request import Request
from jaxcp.inference.sampling import Sampling
from jaxcp.text.grammar import Grammars
from jaxcp.text.tokenizer import Tokenizer


class Asking:
    """Makes the requests of one engine.

    Args:
      stop_tokens: of requests that name none.
      drafts: tokens guessed at a time.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer | None, stop_tokens: Collection[int], drafts: int
    ):
        self.model, self.tokenizer, self.stop_tokens = model, tokenizer, stop_tokens
        self.drafts = drafts
        self.made: weakref.WeakSet[Request] = weakref.WeakSet()
        """Requests that are still somebody's."""

    def requests(
        self, prompt: str | Sequence[int], sampling: Sampling | None = None
    ) -> list[Request]:
        """A request for every answer that is wanted of a prompt; they share its pages.

        Raises:
          ValueError: a prompt that is empty or has ids that are none, or options that this model
            or tokenizer cannot honour.
        """
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling must be a jaxcp.Sampling; got {type(sampling).__name__}")
        ids = self.ids(prompt)
        ids_of("logit_bias", self.model, [*sampling.logit_bias])
        stops = self.stop_tokens
        if sampling.stop_tokens is not None:
            stops = checked_stop_tokens(self.model, sampling.stop_tokens)
        requests: list[Request] = []
        for one in sampling.each():
            output = self._output(one, stops)
            requests.append(
                Request(
                    ids,
                    max_new_tokens=one.max_new_tokens,
                    sampling=one,
                    stop_tokens=stops,
                    output=output,
                    in_turn=output.constraint is not None,
                    guesses=self._guesses(output),
                    after=requests[0] if requests else None,
                )
            )
        self.made.update(requests)
        return requests

    def ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt.

        Raises:
          ValueError: it is empty, has ids that are none, or is text and there is no tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this engine has no tokenizer: give token ids")
            prompt = self.tokenizer.encode(prompt).tolist()
        given = list(prompt) if isinstance(prompt, Iterator) else prompt
        ids = token_ids(self.model, given)
        if ids.ndim != 1:
            raise ValueError(f"a prompt is one sequence of ids; got the shape {ids.shape}")
        if not ids.size:
            raise ValueError("the prompt is empty; send at least one token")
        return ids.tolist()

    def _guesses(self, output) -> Guesses | None:
        """Guesses, but not under a grammar, which must see each token before the next."""
        if not self.drafts or output.constraint is not None:
            return None
        drafting = bool(getattr(self.model.config, "num_mtp_layers", 0))
        return Guesses(self.drafts, drafting=drafting)

    def _output(self, sampling: Sampling, stops: Collection[int]) -> Output:
        grammar, detokenizer, constraint = sampling.compiled_grammar(), None, None
        if self.tokenizer is None and (sampling.stop or grammar is not None):
            raise ValueError(
                "this engine has no tokenizer: answers end at stop tokens and follow no grammar"
            )
        if self.tokenizer is not None and sampling.stop:
            detokenizer = self.tokenizer.detokenizer(sampling.stop)
        if grammar is not None:
            constraint = self._grammars.constraint(grammar, stops)
        return Output(detokenizer, constraint)

    @functools.cached_property
    def _grammars(self) -> Grammars:
        """The tokenizer as grammars need it, from the first request that has one."""
        assert self.tokenizer is not None
        return Grammars(self.tokenizer, self.model.config.vocab_size)


def checked_stop_tokens(model: Any, ids: Any) -> tuple[int, ...]:
    """`ids`, which must be of the model, and few."""
    stops = ids_of("stop_tokens", model, ids)
    if len(set(stops)) > STOPS:
        raise ValueError(
            f"needed at most {STOPS} stop tokens; got {len(stops)}: name those that end an answer "
            "in `stop_tokens`"
        )
    return stops


def ids_of(option: str, model: Any, ids: Any) -> tuple[int, ...]:
    """`ids`, which must be of the model; the error names the option."""
    try:
        array = token_ids(model, list(ids) if isinstance(ids, Set) else ids)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"{option} must be ids, such as (2,) or () for none; got {ids!r}")
    return tuple(array.tolist())
