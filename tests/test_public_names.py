# SPDX-License-Identifier: Apache-2.0
"""Every public name is explained where it is defined and named in a document; documents name files
that are there."""

import inspect
import re
from pathlib import Path

import pytest

import jaxcp
import pallas_kernels

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
NAMES = [(package, name) for package in (jaxcp, pallas_kernels) for name in package.__all__]
VALUES = {"PAD_POSITION"}  # a number has the docstring of int


def own_docstring(value):
    """What is written at its definition: neither inherited nor made up by dataclasses."""
    text = inspect.cleandoc(vars(value).get("__doc__") or "")
    return "" if text.startswith(f"{value.__name__}(") else text


@pytest.mark.parametrize(("package", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_name_has_a_docstring_of_more_than_a_line(package, name):
    value = getattr(package, name)
    if name not in VALUES:
        text = own_docstring(value) if isinstance(value, type) else inspect.getdoc(value) or ""
        assert len(text.splitlines()) >= 3, f"{name}: {text!r}"


def public_members(owner):
    """Its methods and properties that this project defines."""
    for name, member in inspect.getmembers(owner):
        home = next((base for base in owner.__mro__ if name in vars(base)), None)
        ours = home is not None and home.__module__.startswith(("jaxcp", "pallas_kernels"))
        if ours and not name.startswith("_") and (callable(member) or isinstance(member, property)):
            yield name, member


def test_members_have_a_docstring():
    values = {getattr(package, name) for package, name in NAMES if name not in VALUES}
    lacking = [
        f"{value.__name__}.{name}"
        for value in values
        if isinstance(value, type)
        for name, member in public_members(value)
        if not inspect.getdoc(member)
    ]
    assert not lacking


def test_every_name_stands_in_a_document():
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    assert not [name for _, name in NAMES if not re.search(rf"\b{name}\b", text)]


# what a program writes, or a checkpoint has
MADE = {
    "config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json",
    "report.md", "report.json", "found.json",
}  # fmt: skip
FILE = re.compile(r"[`(\s\"']([\w./-]+\.(?:md|jsonl?|png|py|sh|toml))(?=[`)\s\"'#:,;])")


@pytest.mark.parametrize(
    "document",
    [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/results/README.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_file_that_a_document_names_is_there(document):
    named = set(FILE.findall(document.read_text())) - MADE
    folders = (ROOT, document.parent, *(ROOT / name for name in ("jaxcp", "pallas_kernels")))
    folders += tuple(path for path in ROOT.glob("*/*/") if path.is_dir())
    lost = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert not lost
