# SPDX-License-Identifier: Apache-2.0
"""Writes a row of an operation's `tuning.py` as text, at the place where it takes effect."""

import ast
import dataclasses
import pathlib
import types
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcp.tune.evaluate import Problem

WIDTH = 100  # characters of a line


class _Line(NamedTuple):
    """A row of a table: its cells, its lines in the file, and the text of its limit."""

    cells: tuple
    first: int
    end: int
    limit: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Block sizes for devices whose kind starts with `kind`."""

    problem: Problem
    kind: str
    blocks: Any

    @property
    def path(self) -> pathlib.Path:
        """The file with the table."""
        return pathlib.Path(str(self.problem.about.tuning.__file__))

    @property
    def text(self) -> str:
        """The row's source, as it would stand in the table."""
        return self._text(table_lines(self.path.read_text()))

    def write(self, path: pathlib.Path | None = None) -> bool:
        """Put the row into the table of `path` (default: the installed one); False if it is there.

        It replaces a row of the same operation, kind and limits, or goes above the first row that
        would shadow it. Nothing is written unless the table then gives these blocks.

        Raises:
          PermissionError: the file cannot be written, as in an installed package.
        """
        path = path or self.path
        source = path.read_text()
        lines = table_lines(source)
        old = self._shadow(lines)
        if old is not None and repr(old.cells[4]) == repr(self.blocks):
            return False
        if old is None:
            first = end = lines[-1].end
        else:
            first = old.first
            end = old.end if old.cells[:4] == self._key(old) else first
        before, after = source.splitlines()[:first], source.splitlines()[end:]
        text = "\n".join([*before, self._text(lines), *after]) + "\n"
        now = self._shadow(table_lines(text))
        if now is None or repr(now.cells[4]) != repr(self.blocks):
            raise ValueError(f"{path}: with the row in it the table gives {now and now.cells}")
        try:
            path.write_text(text)
        except OSError as error:
            raise PermissionError(
                f"{path} cannot be written ({error.strerror}): tune in a checkout that is "
                "installed with `pip install -e`, or copy the row by hand"
            ) from error
        return True

    def _shadow(self, lines: list[_Line]) -> _Line | None:
        """The first row of the table that matches every device of this row's kind, or None."""
        size = self.problem.shape[self.problem.about.size]
        itemsize = jnp.dtype(self.problem.dtype).itemsize
        for line in lines:
            name, kind, most, most_bytes, _ = line.cells
            holds = size <= most and itemsize <= most_bytes
            if name == self.problem.part and self.kind.startswith(kind) and holds:
                return line
        return None

    def _key(self, old: _Line | None) -> tuple[str, str, int, int]:
        part = self.problem.about
        size = self.problem.shape[part.size]
        most = size if part.exact or old is None else old.cells[2]
        return part.name, self.kind, most, jnp.dtype(self.problem.dtype).itemsize

    def _text(self, lines: list[_Line]) -> str:
        old = self._shadow(lines)
        part, kind, most, itemsize = self._key(old)
        limit = old.limit if old is not None and old.cells[2] == most else str(most)
        searched = self.problem.about.values
        shown = [
            f"{field.name}={getattr(self.blocks, field.name)}"
            for field in dataclasses.fields(self.blocks)
            if field.name in searched or getattr(self.blocks, field.name) != field.default
        ]
        cells = [f'"{part}"', f'"{kind}"', limit, str(itemsize), f"Blocks({', '.join(shown)})"]
        line = f"    ({', '.join(cells)}),"
        if len(line) <= WIDTH:
            return line
        return "\n".join(["    (", *(f"        {cell}," for cell in cells), "    ),"])


def table_lines(source: str) -> list[_Line]:
    """The rows of a table: run the source for their values, parse it for their places."""
    module = types.ModuleType("tuning")
    exec(compile(source, "tuning.py", "exec"), module.__dict__)
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TABLE":
            every = node.value.elts if isinstance(node.value, ast.Tuple) else []
            rows = [row for row in every if isinstance(row, ast.Tuple)]
            if len(rows) == len(module.TABLE):
                return [
                    _Line(cells, row.lineno - 1, row.end_lineno or 0, ast.unparse(row.elts[2]))
                    for cells, row in zip(module.TABLE, rows, strict=True)
                ]
    raise ValueError("the table is not a TABLE of rows written out")
