# SPDX-License-Identifier: Apache-2.0
"""The end of a process when another one is lost: at once, with a code that asks for a restart.

A collective that lacks a process never ends, on some backends not even with an error; and JAX's own
answer to a lost process is to abort. So errors of collectives are told from others by their text,
and a thread asks the coordination service who lives, for links that are cut and say nothing.
"""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

LOST = 75
"""Exit code EX_TEMPFAIL: run all processes again."""
PAUSE = 2.0
"""Seconds between two questions who lives."""
OF_PEERS = re.compile(
    r"gloo|nccl|unavailable|coordination service|heartbeat|socket closed|connection (reset|closed)",
    re.IGNORECASE,
)
"""Words in errors of collectives that lack a process; JAX has no error class for it."""


def leave(reason: str) -> None:
    """End this process at once: nothing may wait for a collective, or for a save of all."""
    text = (
        f"jaxcp: {reason}; this process ends with {LOST}. Start all of them again: a run goes on "
        "from its newest checkpoint"
    )
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(LOST)


@contextlib.contextmanager
def tied() -> Iterator[None]:
    """End the process where a collective of the block fails as another process is gone.

    The first to notice must end fast: its own closed connections tell the next one.
    """
    try:
        yield
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:  # OSError: a save's
        if jax.process_count() > 1 and OF_PEERS.search(str(error)):
            first = str(error).splitlines()[0]
            leave(f"another process of {jax.process_count()} is gone ({first[:160]})")
        raise


def wait_until_alone() -> None:
    """Wait until all other processes have left or are lost.

    For process 0: who leaves once its service has gone is aborted.
    """
    others = True
    while others:
        with contextlib.suppress(multihost_utils.ProcessFailureError):
            with multihost_utils.live_devices(jax.devices()) as live:
                others = any(device.process_index != jax.process_index() for device in live)


class Watch(threading.Thread):
    """Asks who lives, until `end`; where a process is missing, ends this one.

    Needs `jax_enable_recoverability`: without it JAX aborts by itself, code 134.
    """

    def __init__(self) -> None:
        super().__init__(name="jaxcp-watch", daemon=True)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                with multihost_utils.live_devices(jax.devices()):
                    # All answer together, so process 0 sets the pace. The others wait inside their
                    # question: if it ends, they hear so before JAX, which would abort, code 134.
                    if jax.process_index() == 0:
                        self._ended.wait(PAUSE)
            except multihost_utils.ProcessFailureError as error:
                gone = sorted({device.process_index for device in error.failed_devices})
                self._leave(f"process {', '.join(map(str, gone))} is gone")
            except (RuntimeError, ValueError) as error:
                first = str(error).splitlines()[0]
                self._leave(f"process 0, which coordinates, is gone ({first[:160]})")

    def end(self) -> None:
        """Ask no more: who is missing from now on may have left."""
        self._ended.set()

    def _leave(self, reason: str) -> None:
        if not self._ended.is_set():
            leave(reason)
