# SPDX-License-Identifier: Apache-2.0
"""The command that makes token files of text: `prepare`."""

import pathlib
from typing import Annotated, Literal

import tyro


def prepare(
    files: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    out: pathlib.Path,
    tokenizer: str = "byte",
    field: str = "text",
    val: float = 0.1,
    separator: str = "auto",
    separator_at: Literal["ends", "starts"] = "ends",
    shard_tokens: int = 100_000_000,
) -> None:
    """Make a folder of token files, for training and validation, that `train` reads.

    What is written counts when it is complete; until then it lies in OUT.preparing.

    Args:
        files: text, JSON lines (also .gz), Parquet, or "tinyshakespeare", which comes with jaxcp.
        out: a new folder.
        tokenizer: byte, char (the characters of the files), or the path of a tokenizer.json.
        field: the field of JSON, or the column of Parquet, that has the text.
        val: the fraction for validation: the end of a text file; of records those with a low hash.
        separator: the token between documents, as "<|endoftext|>", or none; auto: that of the
            tokenizer.json, and of bytes or characters one of its own where there are many
            documents.
        separator_at: it ends each document (nanoGPT) or starts it (llm.c).
        shard_tokens: most tokens of a file.
    """
    from rich.progress import Progress

    from jaxcp.data.documents import sizes
    from jaxcp.data.prepare import prepare as write

    names = list(files)
    total = sum(sizes(names).values())
    with Progress(transient=True) as bar:
        task = bar.add_task("prepare", total=total)
        prepared = write(
            names, out, encoder=_encoder(names, tokenizer, field, separator), field=field, val=val,
            separator_at=separator_at, shard_tokens=shard_tokens,
            on_read=lambda read: bar.update(task, completed=read),
        )  # fmt: skip
    print(
        f"{out}: {prepared.tokens('train'):,} tokens to train, {prepared.tokens('val'):,} to "
        f"validate, a vocabulary of {prepared.vocab_size:,}"
        + ("" if prepared.separator is None else f", separator {prepared.separator}")
    )


def _encoder(files: list[str], name: str, field: str, separator: str):
    from jaxcp.data.prepare import has_many, symbols
    from jaxcp.text import encoders

    end: str | None = separator
    if separator == "none":
        end = None
    elif separator == "auto" and name in ("byte", "char"):
        end = encoders.END if has_many(files) else None
    elif separator == "auto":
        end = encoders.usual_separator(name)
    if name == "byte":
        return encoders.byte_encoder(separator=end)
    if name == "char":
        return encoders.char_encoder(symbols(files, field=field), separator=end)
    return encoders.file_encoder(name, separator=end)
