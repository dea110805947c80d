# SPDX-License-Identifier: Apache-2.0
"""Turns text into token ids and back, by the `tokenizers` library. Knows no model, no template."""

import functools
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import decoders, models, pre_tokenizers

from jaxcp.input_files import LARGE_JSON_BYTES, parse_json, read_bytes
from jaxcp.text.control import Control, plain_ids
from jaxcp.text.detokenize import BYTE_OF, decoding
from jaxcp.text.generation import Defaults
from jaxcp.text.stop_strings import UntilStop


class Tokenizer:
    """Encodes text to int32 ids and decodes ids to text; adds no special tokens by itself.

    `jaxcp.text.folder.read_tokenizer` reads one with all that a checkpoint says of it.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.begin: tuple[int, ...] = ()
        """Ids that the checkpoint puts before a plain text (BOS)."""
        self.end: tuple[int, ...] = ()
        """Ids that it puts after one (EOS)."""
        self.chat: Any = None
        """A `jaxcp.text.chat.Chat`; None where the checkpoint has no form of conversations."""
        self.defaults = Defaults()
        """Sampling as generation_config.json advises it."""
        self.beside: dict[str, bytes] = {}
        """Files beside tokenizer.json, by their paths, which `save` writes again."""

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
        """Write a `tokenizer.json` that `from_file` reads, and the files that were beside it."""
        Path(path).write_text(self.backend.to_str(), encoding="utf-8")
        for name, data in self.beside.items():
            file = Path(path).parent / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(
        self, text: str, *, read_control_tokens: bool = False, whole: bool = False
    ) -> Int32[np.ndarray, " T"]:
        """Encode `text` to ids.

        Args:
          read_control_tokens: special tokens that are written out in the text become their ids.
            By default they are text, as anything that a user writes.
          whole: put the ids `begin` and `end` around it, as the checkpoint does with a text.
        Raises:
          ValueError: the tokenizer has no token for something in the text.
        """
        if read_control_tokens or not self._special.find(text):
            ids = plain_ids(self.backend, text)
        else:
            ids = self._special.encode_as_text(text)
        return np.asarray([*self.begin, *ids, *self.end] if whole else ids, np.int32)

    @functools.cached_property
    def _special(self) -> Control:
        added = self.backend.get_added_tokens_decoder().values()
        return Control(self.backend, {token.content for token in added if token.special})

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids` to text, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([_id(i) for i in ids], skip_special_tokens=True)

    def stream(self, ids: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
        """Yield printable pieces as `ids` arrive; joined they are `decode(ids)`, cut at a `stop`.

        A character whose bytes are spread over several tokens is kept back until it is whole, and
        a run of byte tokens (of Llama's kind) until it ends.
        """
        text = self.detokenizer(stop)
        yield from filter(None, map(text.push, ids))
        if rest := text.finish():
            yield rest

    def detokenizer(self, stop: Sequence[str] = ()) -> "Detokenizer":
        """Begin a text that is pushed token by token, and ends before one of the strings `stop`."""
        return Detokenizer(self.backend, stop)


class Detokenizer:
    """Text of ids that are pushed; joined, what is given out is that of `decode`, cut at a stop.

    The text ends before the first place where a stop string begins, however it comes in pieces:
    what may be the beginning of one is kept back, even if another, which began later, is complete.

    >>> text = tokenizer.detokenizer(stop=["\nUser:"])
    >>> for token in answer:
    ...     print(text.push(token), end="")
    ...     if text.stopped:
    ...         break
    >>> print(text.finish())
    """

    def __init__(self, backend: tokenizers.Tokenizer, stop: Sequence[str] = ()):
        added = backend.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self._token_of = backend.id_to_token
        self._decoding = decoding(backend.decoder)
        self._until = UntilStop(stop)

    @property
    def stopped(self) -> bool:
        """True from when the text has ended at a stop string: further tokens add nothing."""
        return self._until.stopped

    def push(self, value: int) -> str:
        """Take an id, and give out the text that it makes certain; a special token adds none."""
        token = self._token_of(_id(value))
        if token is None or token in self._special:
            return ""
        return self._until.push(self._decoding.push(token))

    def finish(self) -> str:
        """Give out what was kept back: there are no more tokens, or the next begins anew."""
        return self._until.push(self._decoding.finish()) + self._until.finish()


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
