# SPDX-License-Identifier: Apache-2.0
"""Reads files that somebody else wrote, within bounds. Knows no checkpoints.

A file is opened only if it is a regular one (a pipe would block, a device may never end), read only
up to a size, and parsed as strict JSON. Links are followed wherever they lead: the folders of the
hub's cache are made of them. Errors name the file and the place where it is wrong; they never show
its contents, because a link may lead to a file that the reader of the error must not see.
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

JSON_BYTES = 16 << 20
"""Most bytes of a JSON file; a config.json has a few thousand."""
LARGE_JSON_BYTES = 100_000_000
"""Most bytes of a list of tensors or a vocabulary; safetensors' own limit for its header."""
JSON_VALUES = 4_000_000
"""Most values of a JSON file; each takes Python up to 250 bytes. The tokenizer of Gemma 3, the
largest known, has 1.9 million, the header of a file with 100,000 tensors 0.8 million."""
JSON_DEPTH = 32
INTEGERS = range(-(1 << 63), 1 << 64)


@contextlib.contextmanager
def open_regular(file: str | os.PathLike) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file; yield it and its size.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no regular file, or its name cannot be one.
    """
    try:
        _check_regular(file, os.stat(file))
        # without blocking: it may have become a pipe since
        fd = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:  # a loop of links, a name that is too long, a folder that is a file
        raise ValueError(f"needed a file; {file} cannot be opened: {error.strerror}") from error
    with open(fd, "rb") as handle:
        status = os.fstat(fd)
        _check_regular(file, status)
        yield handle, status.st_size


def _check_regular(file: str | os.PathLike, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise ValueError(f"needed a regular file; {file} is {kind}. Copy the file there")


def read_bytes(file: str | os.PathLike, limit: int) -> bytes:
    """Read a regular file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no regular file, or has more than `limit` bytes.
    """
    with open_regular(file) as (handle, size):
        if size > limit:
            raise ValueError(f"needed a file of at most {limit:,} bytes; {file} has {size:,}")
        return handle.read(limit)


def read_json(
    file: str | os.PathLike, limit: int = JSON_BYTES, *, large_integers: bool = False
) -> dict[str, Any]:
    """Read the object in a JSON file: UTF-8, no NaN or Infinity, no key twice, no deep nesting.

    Args:
      limit: most bytes that are read.
      large_integers: take integers of more than 64 bits, which some programs write for "no limit".
    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not that, is no regular file, or has more than `limit` bytes.
    """
    return parse_json(read_bytes(file, limit), file, large_integers=large_integers)


def parse_json(
    data: bytes, file: str | os.PathLike, *, large_integers: bool = False
) -> dict[str, Any]:
    """Parse `data`, the contents of `file`, as a JSON object with the bounds of `read_json`."""
    try:
        fields = strict_json(data, large_integers=large_integers)
    except ValueError as error:
        raise ValueError(f"needed JSON; got {file}: {error}. Copy it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"needed a JSON object; got {file} with a {type(fields).__name__}")
    return fields


def strict_json(data: bytes, *, large_integers: bool = False) -> Any:
    """Parse `data` as JSON; errors say at which place it is wrong, and show nothing of it."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > JSON_VALUES:
        raise ValueError(f"it has up to {values:,} values; {JSON_VALUES:,} are read")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=int if large_integers else _integer,
        )
        _check_depth(value)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {JSON_DEPTH}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("it has a key twice in one object")
    return fields


def _constant(name: str) -> float:
    raise ValueError(f"it has a number that is {name}")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("it has a number beyond those of float64")
    return number


def _integer(text: str) -> int:
    number = int(text) if len(text) <= 20 else None
    if number is None or number not in INTEGERS:
        raise ValueError("it has an integer of more than 64 bits")
    return number


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(JSON_DEPTH + 1):
        level = [x for x in level if isinstance(x, dict | list)]
        inside = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for x in inside for y in x]
    if level:
        raise RecursionError
