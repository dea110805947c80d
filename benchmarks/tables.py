# SPDX-License-Identifier: Apache-2.0
"""Print what benchmarks print alike: a table in Markdown, versions, a report in a folder."""

import pathlib
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata

RESULTS = pathlib.Path(__file__).parent / "results"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table in Markdown; short rows are filled up with empty cells."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [str(cell).replace("|", "/").replace("\n", " ") for cell in row]
        cells += [""] * (len(head) - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def versions(*packages: str) -> str:
    """Name Python's version and those of `packages`."""
    named = [f"python {platform.python_version()}"]
    for name in packages:
        try:
            named.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            named.append(f"{name} not installed")
    return ", ".join(named)


def write(out: pathlib.Path | None, name: str, text: str) -> None:
    """Print a report, and write it into the folder `out`, if there is one, as `name`."""
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text.rstrip("\n") + "\n")
