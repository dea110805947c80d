# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT that wait for the end of a step."""

import os
import signal
import threading
from typing import Any

CAUGHT = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Notes the first signal of a block in `caught`; a second one ends the process, code 128 + it.

    Handlers are those from before once the block is left. Only the main thread is told of signals:
    in another one nothing is caught or changed. A signal that the process ignores stays ignored.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in CAUGHT}
            # None: somebody's in C, which could not be put back
            own = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}
            self._before = own
            for number in own:
                signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: Any) -> None:
        if self.caught is not None:
            os._exit(128 + number)
        self.caught = signal.Signals(number).name
