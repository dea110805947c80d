# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that waits: bookkeeping is done or not done, never half."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Hold SIGINT back until the end of the block, and let it in within `with allowed():` of it.

    Only the main thread is interrupted by signals: in another one this does nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield contextlib.nullcontext
        return
    waiting: list[tuple] = []

    def deliver():
        if waiting:
            handler(*waiting.pop())

    @contextlib.contextmanager
    def allowed():
        try:
            signal.signal(signal.SIGINT, handler)
            deliver()
            yield
        finally:
            signal.signal(signal.SIGINT, hold)

    def hold(*arguments):
        waiting[:] = [arguments]

    signal.signal(signal.SIGINT, hold)
    try:
        yield allowed
    finally:
        signal.signal(signal.SIGINT, handler)
        deliver()
