# SPDX-License-Identifier: Apache-2.0
"""Turns text into token ids and back, by the `tokenizers` library. Knows no model, no template."""

import operator
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import decoders, models, pre_tokenizers

from jaxcp.input_files import LARGE_JSON_BYTES, parse_json, read_bytes
from jaxcp.text.detokenize import BYTE_OF, pieces


class Tokenizer:
    """Encodes text to int32 ids and decodes ids to text; adds no special tokens by itself."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a `tokenizer.json`.

        Its truncation and padding are switched off: a text becomes all of its tokens.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is no tokenizer, or no strict JSON (`jaxcp.input_files`).
        """
        data = read_bytes(path, LARGE_JSON_BYTES)
        fields = parse_json(data, path)
        try:
            backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            _check_ids(fields["model"]["vocab"])
        except (KeyboardInterrupt, SystemExit):
            raise
        # The library raises a bare Exception, and a BaseException where its Rust code panics.
        except BaseException as error:
            raise ValueError(
                f"needed a tokenizer.json of the tokenizers library; got {path}: {error!s:.500}. "
                "Copy the file from the checkpoint again"
            ) from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend)

    def save(self, path: str | os.PathLike) -> None:
        """Write a `tokenizer.json` that `from_file` reads."""
        Path(path).write_text(self.backend.to_str(), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """Encode `text` to ids. Special tokens written out in the text become their ids."""
        try:
            encoded = self.backend.encode(text, add_special_tokens=False)
        except Exception as error:  # a bare one, such as for a character without an unknown token
            raise ValueError(f"needed a text that this tokenizer can encode: {error}") from error
        return np.asarray(encoded.ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids` to text, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([_id(i) for i in ids], skip_special_tokens=True)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield printable pieces as `ids` arrive; joined they are `decode(ids)`.

        A character whose bytes are spread over several tokens is kept back until it is whole, and
        a run of byte tokens (of Llama's kind) until it ends.
        """
        added = self.backend.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        tokens = (self.backend.id_to_token(_id(i)) for i in ids)
        return pieces(
            self.backend.decoder, (t for t in tokens if t is not None and t not in special)
        )


def _check_ids(vocab: dict[str, int] | list) -> None:
    """Raise ValueError for an id of more than 31 bits; the ids of a list are its indices."""
    if isinstance(vocab, dict) and max(vocab.values(), default=0) >= 1 << 31:
        raise ValueError("it has an id of more than 31 bits")


def byte_level() -> Tokenizer:
    """Make a tokenizer of 256 ids, the values of the bytes of UTF-8 text."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=BYTE_OF, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def _id(value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**32 or isinstance(value, bool):
        raise ValueError(f"token ids must be integers from 0 on; got {value!r}")
    return number


def read_text(path: str | os.PathLike) -> str:
    """Read the text of a UTF-8 file, line endings as they are.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is empty or not UTF-8.
    """
    data = Path(path).read_bytes()
    if not data:
        raise ValueError(f"needed text; got {path}, which is empty. Name a file with text in it")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"needed UTF-8 text; got {path} with byte 0x{data[error.start]:02x} at offset "
            f"{error.start} ({error.reason}). Convert it first: iconv -f LATIN1 -t UTF-8 (name the "
            "encoding that the file has)"
        ) from error
