# SPDX-License-Identifier: Apache-2.0
"""`pytest --share 2/4 --quick 1/3`: a quarter of the slow tests, a third of the others.

A part is drawn by the names of the tests, so that all of them together are the suite, whatever is
added. CI runs those that its commit draws.
"""

import re
import zlib

import pytest


def share(text: str) -> tuple[int, int]:
    """`K/N` as numbers."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise pytest.UsageError(f"a share is K/N with K from 1 to N, not {text!r}")
    return int(match[1]), int(match[2])


def drawn(name: str, which: int, parts: int) -> bool:
    """True if part `which` has the test of this name."""
    return zlib.crc32(name.encode()) % parts + 1 == which


def function(name: str) -> str:
    """The test without its parameters: they have most of what they compile in common."""
    return name.partition("[")[0]


def pytest_addoption(parser):
    parser.addoption("--share", default="1/1", help="of the slow tests run part K of N: K/N")
    parser.addoption("--quick", default="1/1", help="of the quick tests run part K of N: K/N")


def pytest_collection_modifyitems(config, items):
    slow, quick = (share(config.getoption(option)) for option in ("--share", "--quick"))
    kept, left_out = [], []
    for item in items:
        if item.get_closest_marker("slow") is not None:
            chosen = drawn(item.nodeid, *slow)
        else:
            chosen = drawn(function(item.nodeid), *quick)
        (kept if chosen else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
