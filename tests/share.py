# SPDX-License-Identifier: Apache-2.0
"""`pytest --share 2/4`: every quick test, and the second quarter of the slow ones.

A part is drawn by the names of the tests, so that all of them together are the suite, whatever is
added. CI runs one that its commit draws.
"""

import re
import zlib

import pytest


def share(text: str) -> tuple[int, int]:
    """`K/N` as numbers."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise pytest.UsageError(f"--share takes K/N with K from 1 to N, not {text!r}")
    return int(match[1]), int(match[2])


def drawn(name: str, which: int, parts: int) -> bool:
    """True if part `which` has the test of this name."""
    return zlib.crc32(name.encode()) % parts + 1 == which


def pytest_addoption(parser):
    parser.addoption("--share", default="1/1", help="of the slow tests run part K of N: K/N")


def pytest_collection_modifyitems(config, items):
    which, parts = share(config.getoption("--share"))
    kept, left_out = [], []
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        (kept if not slow or drawn(item.nodeid, which, parts) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
