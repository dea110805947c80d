# SPDX-License-Identifier: Apache-2.0
"""Reads the tokens of an answer as they come: makes its text, and tells where it ends."""

from collections.abc import Sequence

from jaxcp.inference.logprobs import TokenLogProbs
from jaxcp.text.grammar import Constraint
from jaxcp.text.tokenizer import Detokenizer


class Output:
    """An answer as it is read.

    Args:
      detokenizer: for an answer that ends at stop strings; None where there are none.
      constraint: the grammar that it follows, if there is one.
    """

    def __init__(self, detokenizer: Detokenizer | None, constraint: Constraint | None):
        self.constraint = constraint
        self.logprobs: list[TokenLogProbs] = []
        self._detokenizer, self._text, self._finished = detokenizer, "", False

    def error(self) -> ValueError | None:
        """The error of a row without a token to choose from, if that is for its grammar."""
        if self.constraint is None or self.constraint.allowed().any():
            return None
        return ValueError(
            "no token that is not a stop token goes on with the grammar"
            + f": {self.constraint.trouble}" * bool(self.constraint.trouble)
        )

    def take(self, tokens: Sequence[int], logprobs: Sequence[TokenLogProbs]) -> int | None:
        """Take what has joined the answer; how many of them are there when it ends, if it does.

        Args:
          logprobs: one for each token, or none at all.
        """
        for number, token in enumerate(tokens):
            self.logprobs += logprobs[number : number + 1]
            if self._detokenizer is not None:
                self._text += self._detokenizer.push(token)
            if self.constraint is not None:
                self.constraint.take(token)
            if self._ends():
                return number + 1
        return None

    def finish(self) -> bool:
        """Take note that nothing follows; True if the answer ends at a stop string or grammar."""
        if self._detokenizer is not None and not self._finished:
            self._text += self._detokenizer.finish()
        self._finished = True
        return self._ends()

    @property
    def text(self) -> str | None:
        """Text up to a stop string, or to what may become one; None where there are no such."""
        return None if self._detokenizer is None else self._text

    def _ends(self) -> bool:
        stopped = self._detokenizer is not None and self._detokenizer.stopped
        return stopped or (self.constraint is not None and self.constraint.complete)
