# SPDX-License-Identifier: Apache-2.0
"""The answer of a request, so far or in the end."""

import dataclasses

from jaxcp.inference.logprobs import TokenLogProbs
from jaxcp.inference.request import Request, RequestStats, Status
from jaxcp.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Answer of a request, with how it went."""

    tokens: list[int]
    text: str | None
    """None without a tokenizer. It ends before a stop string, which tokens may still have."""
    finish_reason: str | None
    """"stop", "length", "cancelled" or "failed"; None while it runs."""
    stats: RequestStats
    logprobs: list[TokenLogProbs] | None = None
    """One for every token; None where none are asked for."""


def result_of(request: Request, tokenizer: Tokenizer | None) -> Result:
    """Make the result of what a request has by now."""
    if request.done:
        request.output.finish()
    text = request.output.text
    if text is None and tokenizer is not None:
        text = tokenizer.decode(request.answer)
    reason = request.finish_reason
    if request.status in (Status.CANCELLED, Status.FAILED):
        reason = request.status.value
    return Result(
        tokens=request.answer,
        text=text,
        finish_reason=reason,
        stats=request.stats,
        logprobs=None if request.sampling.logprobs is None else request.output.logprobs,
    )
