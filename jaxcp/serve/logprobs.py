# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities as OpenAI's clients read them."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from jaxcp.inference.logprobs import TokenLogProbs
from jaxcp.text.detokenize import BYTE, BYTE_OF
from jaxcp.text.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class TokenTexts:
    """The bytes that each token stands for: a part of a character, where it is no more."""

    def __init__(self, tokenizer: Tokenizer):
        self._backend = tokenizer.backend
        self.special = frozenset(self._backend.get_added_tokens_decoder())
        """Ids of control tokens."""
        self.bytes_of = functools.lru_cache(maxsize=65_536)(self._bytes_of)

    def _bytes_of(self, token: int) -> bytes:
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        if BYTE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        text = self._backend.decode([token], skip_special_tokens=False)
        if "\ufffd" in text and all(character in BYTE_OF for character in name):
            return bytes(BYTE_OF[character] for character in name)
        return text.encode()

    def text_of(self, token: int) -> str:
        return self.bytes_of(token).decode("utf-8", "replace")

    def chat(self, logprobs: TokenLogProbs) -> dict[str, Any]:
        """An entry of `logprobs.content` of a chat."""
        best = [self._one(token, value) for token, value in logprobs.best]
        return self._one(logprobs.token, logprobs.logprob) | {"top_logprobs": best}

    def _one(self, token: int, value: float) -> dict[str, Any]:
        return {
            "token": self.text_of(token),
            "logprob": max(value, LEAST),
            "bytes": list(self.bytes_of(token)),
        }

    def completion(self, logprobs: tuple[TokenLogProbs, ...], offset: int) -> dict[str, Any]:
        """The `logprobs` of a completion, whose first token begins at `offset` of its text."""
        offsets = []
        for one in logprobs:
            offsets.append(offset)
            offset += len(self.text_of(one.token))
        return {
            "tokens": [self.text_of(one.token) for one in logprobs],
            "token_logprobs": [None if _is_first(x) else max(x.logprob, LEAST) for x in logprobs],
            "top_logprobs": [None if _is_first(x) else self._best(x) for x in logprobs],
            "text_offset": offsets,
        }

    def _best(self, one: TokenLogProbs) -> dict[str, float]:
        return {self.text_of(token): max(value, LEAST) for token, value in reversed(one.best)}


def of_prompt(ids: Sequence[int], scored: Sequence[TokenLogProbs]) -> tuple[TokenLogProbs, ...]:
    """Make those of a prompt. Its first token has none: NaN here, null for clients."""
    return TokenLogProbs(token=ids[0], logprob=math.nan, best=()), *scored


def _is_first(logprobs: TokenLogProbs) -> bool:
    return math.isnan(logprobs.logprob)
