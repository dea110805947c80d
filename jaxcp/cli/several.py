# SPDX-License-Identifier: Apache-2.0
"""A command that runs as one of several processes."""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Iterator

from jaxcp.cli.devices import want_devices
from jaxcp.cli.terminal import DEBUG, FAILED, INTERRUPTED, describe

GRACE = 1.0
"""Seconds that process 0 stays after an error: where it ends, all others are ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Several processes, as one a host; each is started with the same command."""

    distributed: bool = False
    """Join the job of several processes that jax finds: Slurm, Open MPI, GKE, Cloud TPU."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where jax does not find it; with --processes, --process-id."""
    processes: int | None = None
    """The number of processes."""
    process_id: int | None = None
    """The number of this process, from 0."""
    heartbeat: int = 30
    """Seconds of silence after which a process is taken for lost, and the others end, code 75."""

    @property
    def many(self) -> bool:
        options = (self.coordinator, self.processes, self.process_id)
        return self.distributed or options != (None, None, None)


ALONE = Processes()


@contextlib.contextmanager
def one_of(options: Processes, devices: int | None = None) -> Iterator[None]:
    """Join the other processes, if any, and part from them when all are done.

    An error ends this process, without waiting for others that may wait for it.

    Args:
      devices: those of the mesh, for CPUs to emulate; None takes what there is.
    """
    if not options.many:
        if devices is not None:
            want_devices(devices)
        yield
        return
    from jaxcp import processes

    joined = processes.join(
        coordinator=options.coordinator,
        processes=options.processes,
        process_id=options.process_id,
        devices=devices,
        heartbeat=options.heartbeat,
    )
    print(joined, flush=True)
    try:
        if devices is not None:
            processes.check_takes_all(devices)
        with processes.tied():
            yield
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED, joined.process)
    except Exception as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        _end(describe(error), FAILED, joined.process)
    processes.part()


def _end(text: str, code: int, process: int) -> None:
    print(f"jaxcp: process {process}: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if process == 0:
        time.sleep(GRACE)
    os._exit(code)
