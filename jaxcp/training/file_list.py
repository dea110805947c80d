# SPDX-License-Identifier: Apache-2.0
"""The list of a folder's files with their sizes and hashes: what counts, and what is damaged."""

import hashlib
import json
import os
import pathlib
from typing import Any

from jaxcp.input_files import open_regular, read_json

FILES = "files.json"
CHUNK = 1 << 20
DIGEST = 16  # bytes


class Damaged(ValueError):
    """A file that is not as it was written; reading it again would not help."""


def write_list(folder: pathlib.Path) -> None:
    """Put `files.json` into a folder, after all of it has reached the disk.

    Raises:
      OSError: it could not be written.
    """
    listed = {name: _entry(folder / name) for name in _names(folder)}
    for path in (*(folder / name for name in listed), *_folders(folder)):
        sync(path)
    fresh = folder.with_name(f"{folder.name}.{FILES}")
    fresh.write_text(json.dumps(listed, indent=1))
    sync(fresh)
    fresh.replace(folder / FILES)
    sync(folder)
    sync(folder.parent)


def check_list(folder: pathlib.Path, *, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a folder with its list, contents and all.

    Args:
      part: the number of this part of the list, of `parts` that are compared elsewhere.
    Raises:
      Damaged: a file is missing, cut off or changed, naming it; or the list is no list.
      OSError: a file cannot be read.
    """
    try:
        listed = read_json(folder / FILES)
    except ValueError as error:
        raise Damaged(str(error)) from error
    ours = [*listed.items()][part::parts]
    wrong = [said for name, entry in ours if (said := _difference(folder, name, entry))]
    if wrong:
        raise Damaged("; ".join(wrong))


def drop_unlisted(folder: pathlib.Path) -> None:
    """Delete the files of a folder that its list does not have, or has otherwise."""
    try:
        listed = read_json(folder / FILES)
    except (ValueError, FileNotFoundError):
        listed = {}
    for name in _names(folder):
        if name not in listed or _difference(folder, name, listed[name]):
            (folder / name).unlink()


def sync(path: pathlib.Path) -> None:
    """Wait until a file or the names in a folder have reached the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _difference(folder: pathlib.Path, name: str, entry: Any) -> str | None:
    # lists from before there were hashes have sizes alone
    size = entry if isinstance(entry, int) else entry.get("bytes")
    path = folder / name
    if not path.exists():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} of {size} bytes"
    if not isinstance(entry, int) and _hash(path) != entry.get("blake2b"):
        return f"{name} has other contents than were written"
    return None


def _entry(path: pathlib.Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "blake2b": _hash(path)}


def _hash(path: pathlib.Path) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST)
    with open_regular(path) as (file, _):
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _names(folder: pathlib.Path) -> list[str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for path in files if (name := path.relative_to(folder).as_posix()) != FILES]


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.rglob("*") if path.is_dir()]
