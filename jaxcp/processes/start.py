# SPDX-License-Identifier: Apache-2.0
"""The way in which processes find each other, and part."""

import dataclasses
import os
from collections.abc import Mapping

import jax

from jaxcp.processes.agreement import gather, is_first, several
from jaxcp.processes.lost import Watch, tied, wait_until_alone

HEARTBEAT = 30
"""Seconds after which a process that is not heard of is taken for lost."""
CLUSTERS = {
    "Slurm": ("SLURM_JOB_ID", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK",),
    "GKE TPU": ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST",),
}
"""Environment variables by which jax knows where it is; a Cloud TPU VM asks its metadata."""

_watches: list[Watch] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined:
    """The place of this process among the others, as `join` found it."""

    process: int
    processes: int
    local_devices: int
    devices: int
    platform: str
    coordinator: str
    by: str

    def __str__(self) -> str:
        return (
            f"process {self.process} of {self.processes} ({self.by}; coordinator "
            f"{self.coordinator}): {self.local_devices} of {self.devices} {self.platform} devices"
        )


def join(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    devices: int | None = None,
    heartbeat: int = HEARTBEAT,
) -> Joined:
    """Join the other processes of a job; before anything else uses jax.

    Under Slurm, Open MPI, GKE, Kubernetes (with the package `kubernetes`) and on Cloud TPU VMs jax
    finds the three addresses by itself; elsewhere all of them are given. A process that is lost is
    noticed within `heartbeat` seconds, at once where its machine closes the connections, and the
    others then end with exit code 75.

    Args:
      coordinator: HOST:PORT of process 0, which listens there.
      process_id: the number of this one, from 0.
      devices: CPU devices of all processes, where there is no accelerator.
      heartbeat: seconds; more where hosts have few cores to compile with.
    Raises:
      ValueError: some of the three are missing or wrong, or jax finds no job here.
      RuntimeError: jax was used before.
    """
    _check(coordinator, processes, process_id)
    if devices is not None and processes is not None:
        jax.config.update("jax_num_cpu_devices", -(-devices // processes))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_recoverability", True)  # without it a lost process aborts all
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            cluster_detection_method=None if coordinator is None else "deactivate",
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except ValueError as error:
        raise ValueError(
            f"no job of several processes is here ({error}): jax knows Slurm, Open MPI, GKE, "
            "Kubernetes and Cloud TPU VMs. Elsewhere give a coordinator, processes and a process id"
        ) from error
    joined = Joined(
        process=jax.process_index(),
        processes=jax.process_count(),
        local_devices=jax.local_device_count(),
        devices=jax.device_count(),
        platform=jax.default_backend(),
        coordinator=coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "found by jax"),
        by="given" if coordinator is not None else _cluster(os.environ),
    )
    if joined.processes > 1:
        _watches.append(Watch())
        _watches[-1].start()
    return joined


def part() -> None:
    """Leave the job, once all processes have come to this."""
    with tied():
        gather(None)
        for watch in _watches:
            watch.end()
        gather(None)  # no watch is left that would take who leaves for lost
    for watch in _watches:
        watch.join()
    _watches.clear()
    if several() and is_first():
        wait_until_alone()
    jax.distributed.shutdown()


def _check(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    given = {"coordinator": coordinator, "processes": processes, "process id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"{', '.join(given)} are given together; {', '.join(missing)} missing")
    if coordinator is None or processes is None or process_id is None:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"the coordinator is HOST:PORT, of process 0; got {coordinator!r}")
    if not 0 <= process_id < processes:
        raise ValueError(
            f"process ids are 0 to processes - 1; got {process_id} of {processes} processes"
        )


def _cluster(environment: Mapping[str, str]) -> str:
    fitting = (name for name, variables in CLUSTERS.items() if all(map(environment.get, variables)))
    return next(fitting, "Cloud TPU")
