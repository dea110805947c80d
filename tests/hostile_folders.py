# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders to spoil, and what must be refused at once."""

import contextlib
import json
import shutil
import signal
import tracemalloc

import pytest
from tiny_checkpoints import FIXTURES

from jaxcp import weights


@contextlib.contextmanager
def bounded(seconds=30, peak=100 << 20):
    """Fails what blocks, and what takes a lot of memory."""

    def late(*_):
        raise AssertionError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def folder_of(path, name="gpt2-tiny", **config):
    """The fixture's files, fields of config.json changed."""
    path.mkdir()
    fields = json.loads((FIXTURES / name / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | config))
    shutil.copy(FIXTURES / name / "model.safetensors", path)
    return path


def refused(path, match, error=ValueError):
    with bounded(), pytest.raises(error, match=match) as caught:
        weights.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)
