# SPDX-License-Identifier: Apache-2.0
"""Token files, told apart by their first bytes; all little-endian, all mapped into memory.

| file | begins with | then |
|---|---|---|
| ours | `JAXCPTOK`, u32 version 1, u32 bytes of a token, u64 count, zeros up to 64 bytes | tokens |
| llm.c, modded-nanogpt | 256 int32: 20240520, version 1, count | uint16 tokens |
| llm.c for Llama 3 | 256 int32: 20240801, version 7, count | uint32 tokens |
| Megatron | nothing: its `.idx` begins with `MMIDIDX` | tokens of the `.idx`'s dtype |
| nanoGPT | nothing | tokens of the dtype that the reader names |

Sources: dev/data/data_common.py of karpathy/llm.c, megatron/core/datasets/indexed_dataset.py of
NVIDIA/Megatron-LM.
"""

import os
import pathlib
import struct
from typing import NamedTuple

import numpy as np

MAGIC, HEADER = b"JAXCPTOK", 64
FIELDS = struct.Struct("<8sIIQ")
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""The first number of a header of llm.c: the version, and the dtype of the tokens."""
LLM_C_HEADER = 1024
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_FIELDS = struct.Struct("<9sQBQQ")
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
OTHERS = {
    name: f"is {kind}: `jaxcp prepare` makes token files of it"
    for kind, names in {
        "text": (".txt", ".md"),
        "JSON": (".json", ".jsonl", ".ndjson"),
        "Parquet": (".parquet",),
    }.items()
    for name in names
} | {name: "is no token file" for name in (".npy", ".npz", ".pkl", ".gz", ".zst", ".safetensors")}


class Tokens(NamedTuple):
    """A file's place of tokens: after `offset` bytes, `number` of them."""

    offset: int
    dtype: str
    number: int
    said_by: str
    """The place that says how many there are."""


def header(count: int, itemsize: int) -> bytes:
    """Write the header of one of our files."""
    return FIELDS.pack(MAGIC, 1, itemsize, count).ljust(HEADER, b"\0")


def open_tokens(path: str | os.PathLike, dtype: str = "uint16") -> np.ndarray:
    """Map the tokens of a file `[N]` into memory.

    Args:
      dtype: of the tokens, where nothing in the file says so.
    Raises:
      ValueError: the file is empty, cut off, of another kind, or has another size than its header
        or its `.idx` says.
    """
    path = pathlib.Path(path)
    if problem := OTHERS.get(path.suffix.lower()):
        raise ValueError(f"needed a token file; {path} {problem}")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"token file {path} is empty; write it again or take it out")
    with path.open("rb") as file:
        head = file.read(LLM_C_HEADER)
    tokens = _described(path, head) or _raw(path, size, dtype)
    expected = tokens.offset + tokens.number * np.dtype(tokens.dtype).itemsize
    if size != expected:
        raise ValueError(
            f"{tokens.said_by} says {tokens.number:,} tokens of {np.dtype(tokens.dtype)}, "
            f"{expected:,} bytes in all; token file {path} has {size:,}: it is cut off, or not its "
            "own"
        )
    if not tokens.number:
        raise ValueError(f"token file {path} holds no token; take it out")
    return np.memmap(path, tokens.dtype, "r", offset=tokens.offset, shape=(tokens.number,))


def _described(path: pathlib.Path, head: bytes) -> Tokens | None:
    """Read a header, or the `.idx` beside the file; None where there is neither."""
    if head.startswith(MAGIC):
        return _ours(path, head)
    first = int.from_bytes(head[:4], "little")
    if first in LLM_C:
        return _llm_c(path, head, first)
    if head.startswith(MEGATRON):
        raise ValueError(f"{path} is the index of Megatron's; name the .bin beside it")
    index = path.with_suffix(".idx")
    return _megatron(index) if path.suffix == ".bin" and index.is_file() else None


def _ours(path: pathlib.Path, head: bytes) -> Tokens:
    if len(head) < HEADER:
        raise ValueError(f"token file {path} ends within its header: it is cut off")
    _, version, itemsize, count = FIELDS.unpack_from(head)
    if version != 1 or itemsize not in (1, 2, 4):
        raise ValueError(
            f"needed version 1 with tokens of 1, 2 or 4 bytes; {path} has version {version} with "
            f"{itemsize}: it was written by a newer jaxcp"
        )
    return Tokens(HEADER, f"<u{itemsize}", count, "its header")


def _llm_c(path: pathlib.Path, head: bytes, first: int) -> Tokens:
    version, dtype = LLM_C[first]
    if len(head) < LLM_C_HEADER:
        raise ValueError(f"token file {path} ends within its header: it is cut off")
    _, its_version, count = struct.unpack_from("<3i", head)
    if its_version != version or count < 0:
        raise ValueError(
            f"needed version {version} after {first} in a header of llm.c; {path} has "
            f"{its_version}, with {count} tokens"
        )
    return Tokens(LLM_C_HEADER, dtype, count, "its header")


def _megatron(index: pathlib.Path) -> Tokens:
    """Read an `.idx`: its sequences must follow each other in the `.bin` without gaps."""
    data = index.read_bytes()
    if len(data) < MEGATRON_FIELDS.size or not data.startswith(MEGATRON):
        raise ValueError(f"needed an index of Megatron's beside a .bin; {index} is none")
    _, version, code, sequences, documents = MEGATRON_FIELDS.unpack_from(data)
    if version != 1 or code not in MEGATRON_DTYPES:
        raise ValueError(
            f"needed version 1 and a dtype of integers, {sorted(MEGATRON_DTYPES)}; "
            f"{index} has version {version} and dtype {code}"
        )
    expected = MEGATRON_FIELDS.size + 12 * sequences + 8 * documents
    if len(data) not in (expected, expected + sequences):  # modes, of multimodal data
        raise ValueError(
            f"{index} says {sequences:,} sequences and {documents:,} documents, {expected:,} bytes "
            f"in all; it has {len(data):,}: it is cut off"
        )
    lengths = np.frombuffer(data, "<i4", sequences, MEGATRON_FIELDS.size).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", sequences, MEGATRON_FIELDS.size + 4 * sequences)
    dtype = MEGATRON_DTYPES[code]
    begins = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    if (lengths < 0).any() or (pointers != begins).any():
        raise ValueError(f"needed sequences one after the other; those of {index} lie otherwise")
    return Tokens(0, dtype, int(lengths.sum()), str(index))


def _raw(path: pathlib.Path, size: int, dtype: str) -> Tokens:
    itemsize = np.dtype(dtype).itemsize
    if size % itemsize:
        raise ValueError(
            f"token file {path} has {size} bytes, which is no multiple of {itemsize} ({dtype}): "
            "it is cut off or of another dtype"
        )
    return Tokens(0, np.dtype(dtype).newbyteorder("<").str, size // itemsize, "its size")
