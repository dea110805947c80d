# SPDX-License-Identifier: Apache-2.0
"""Encoders of a corpus: by bytes, by characters, or by a tokenizer.json, with a separator.

They encode what stands in the text: a special token that is written out there stays text.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxcp.text.tokenizer import Tokenizer, byte_level

END = "<|endoftext|>"
"""The separator of bytes and characters, and of many a tokenizer.json."""
ENDS = (END, "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eos|>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """A tokenizer, and the way in which documents are encoded by it."""

    tokenizer: Tokenizer
    encode: Callable[[list[str]], list[np.ndarray]]
    """Texts to their ids; it raises ValueError for one that it cannot encode."""
    separator: int | None = None
    """The id between documents."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1


def byte_encoder(*, separator: str | None = None) -> Encoder:
    """Bytes of UTF-8, and the separator as id 256."""
    tokenizer = byte_level()

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    return Encoder(tokenizer=tokenizer, encode=encode, separator=_added(tokenizer, separator))


def char_encoder(symbols: Iterable[str], *, separator: str | None = None) -> Encoder:
    """The characters `symbols`, numbered in order (as nanoGPT's), and the separator after them."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(set(symbols)))}
    tokenizer = char_level("".join(vocab))
    known = np.array([ord(symbol) for symbol in vocab], np.uint32)

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.searchsorted(known, _codes(text, vocab)) for text in texts]

    return Encoder(tokenizer=tokenizer, encode=encode, separator=_added(tokenizer, separator))


def file_encoder(path: str | os.PathLike, *, separator: str | None = None) -> Encoder:
    """A tokenizer.json.

    Raises:
      ValueError: the file is none, or has no token that is the separator.
    """
    tokenizer = Tokenizer.from_file(path)
    of_text = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    of_text.encode_special_tokens = True

    def encode(texts: list[str]) -> list[np.ndarray]:
        encodings = of_text.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    number = None if separator is None else tokenizer.backend.token_to_id(separator)
    if separator is not None and number is None:
        raise ValueError(f"the separator must be a token of {path}; it has no {separator!r}")
    return Encoder(tokenizer=tokenizer, encode=encode, separator=number)


def usual_separator(path: str | os.PathLike) -> str:
    """Find the token that ends a document in a tokenizer.json, by its name.

    Raises:
      ValueError: it has none of the names that are known.
    """
    backend = Tokenizer.from_file(path).backend
    name = next((end for end in ENDS if backend.token_to_id(end) is not None), None)
    if name is None:
        raise ValueError(
            f"{path} has none of {ENDS} to end a document: name its token by separator, or "
            "'none' for documents without one between them"
        )
    return name


def char_level(symbols: str) -> Tokenizer:
    """Make a tokenizer of single characters, their ids in the order of `symbols`."""
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def _added(tokenizer: Tokenizer, separator: str | None) -> int | None:
    if separator is None:
        return None
    tokenizer.backend.add_special_tokens([AddedToken(separator, special=True)])
    return tokenizer.backend.token_to_id(separator)


def _codes(text: str, vocab: dict[str, int]) -> np.ndarray:
    if unknown := set(text) - vocab.keys():
        raise ValueError(f"needed characters of the alphabet; got {sorted(unknown)[:10]}")
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
