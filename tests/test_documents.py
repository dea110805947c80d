# SPDX-License-Identifier: Apache-2.0
"""Documents and docstrings speak of every public name, and of nothing that is not there."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import jaxcp
import pallas_kernels

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
FRAGMENT = re.compile(r"(As|From|How|Of|Those|What|Where|Whether|Which|Whose|Why)\b")
# Rooms and files that still have docstrings which begin so; the list only gets shorter.
NAMES = [(m, name) for m in (jaxcp, pallas_kernels) for name in m.__all__]
NAMES = [pytest.param(m, name, id=f"{m.__name__}.{name}") for m, name in NAMES]


@pytest.mark.parametrize("module, name", NAMES)
def test_a_public_name_is_explained(module, name):
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    assert re.search(rf"\b{name}\b", text), "no document speaks of it"
    value = getattr(module, name)
    if callable(value):
        said = inspect.getdoc(value) or ""
        assert len(said.splitlines()) > 1, f"its docstring is {said!r}"


@pytest.mark.parametrize("path", [*DOCUMENTS, RESULTS / "README.md"], ids=lambda path: path.name)
def test_files_that_are_named_are_there(path):
    folders = "configs|examples|docs|benchmarks|jaxcp|pallas_kernels|tests"
    found = re.findall(rf"\b(?:{folders})/[\w./-]+\.(?:py|md|sh|json)\b", path.read_text())
    if path.parent == RESULTS:
        found += [
            f"benchmarks/results/{x}"
            for x in re.findall(r"`([\w-]+\.(?:md|jsonl?))`", path.read_text())
        ]
    missing = [name for name in found if "<" not in name and not (ROOT / name).exists()]
    assert not missing, missing


def docstrings(path):
    """Every string that stands by itself in a body: those of modules, classes, functions, names."""
    for node in ast.walk(ast.parse(path.read_text())):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant):
                yield statement.lineno, str(value.value).lstrip()


def fragments():
    """`path:line text` of every docstring that begins with a fragment."""
    for package in ("jaxcp", "pallas_kernels"):
        for path in sorted(ROOT.joinpath(package).rglob("*.py")):
            for line, text in docstrings(path):
                if FRAGMENT.match(text):
                    yield f"{path.relative_to(ROOT).as_posix()}:{line} {text.splitlines()[0]}"


def test_a_docstring_begins_with_a_verb_or_a_noun():
    assert not list(fragments())
