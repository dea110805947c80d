# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and the separator of a run's data, as far as its source says them."""

from typing import Any

from jaxcp.data.mixture import Mixture
from jaxcp.data.sources import TextSource, TokenFiles
from jaxcp.text.encoders import char_level
from jaxcp.text.tokenizer import Tokenizer, byte_level


def tokenizer_of(source: Any, vocab_size: int) -> Tokenizer | None:
    """The tokenizer that made the tokens of a source; None where it does not say.

    A source of one's own with 256 tokens has bytes.
    """
    if isinstance(source, TokenFiles):
        file = source.tokenizer_file
        return None if file is None else Tokenizer.from_file(file)
    if isinstance(source, TextSource):
        return byte_level() if source.symbols is None else char_level(source.symbols)
    if isinstance(source, Mixture):
        every = [tokenizer_of(part, vocab_size) for part in source.parts]
        alike = {None if one is None else one.backend.to_str() for one in every}
        return every[0] if len(alike) == 1 else None
    return byte_level() if vocab_size == 256 else None


def separator_of(source: Any) -> int | None:
    """The token that ends a document of a source, which ends an answer too."""
    if isinstance(source, TokenFiles):
        return source.stream.separator
    if isinstance(source, Mixture):
        ends = {separator_of(part) for part in source.parts}
        return ends.pop() if len(ends) == 1 else None
    return None
