# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: whose it is, and that all processes see it."""

import hashlib
import json
import pathlib
import time
import uuid
from typing import Any

from jaxcp import processes
from jaxcp.training import checkpoint
from jaxcp.training.config import TrainConfig
from jaxcp.training.identity import differences, identity, plain
from jaxcp.training.shards import tokens_of
from jaxcp.training.start import CHECKPOINTS, CONFIG, read_identity

RESOLVED = "resolved.json"
PATIENCE = 10.0
"""Seconds in which a file that one host has written must be seen by another."""


def claim(config: TrainConfig) -> None:
    """Write the run's `identity` into `out_dir/config.json`, or check that the one there agrees.

    Every field of the config goes into `out_dir/resolved.json`.

    Raises:
      ValueError: the folder holds another run; of several processes, one has another config, or
        does not see the folder.
    """
    _agree(plain(config, everything=True), "configuration")
    processes.by_first(lambda: _write(config))
    _check_shared(pathlib.Path(config.out_dir))


def check_data(source: Any) -> None:
    """Check that all processes have data of the same files, with as many tokens.

    Raises:
      ValueError: one has not, naming it.
    """
    if processes.several():
        counts = processes.together(lambda: tokens_of(source))
        digest = hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()
        _agree({"tokens of each file": digest}, "data")


def _write(config: TrainConfig) -> None:
    out_dir = pathlib.Path(config.out_dir)
    ours, began = identity(config), checkpoint.steps(out_dir / CHECKPOINTS)
    if (out_dir / CONFIG).exists() and began:
        theirs = read_identity(out_dir)
        if config.extended and theirs.get("steps") == config.extended[-1] == began[-1]:
            theirs = theirs | _longer(config, theirs, ours)
        lines = differences(theirs, ours)
        if lines:
            raise ValueError(
                f"{out_dir} holds a run with another configuration: {'; '.join(lines)}. "
                "Use another out_dir, or set these back to resume"
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_json(out_dir / CONFIG, ours)
    _write_json(out_dir / RESOLVED, plain(config, everything=True))


def _longer(config: TrainConfig, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The run that a finished one becomes; its context may grow after its old end."""
    begun = [stage for stage in ours.get("context", []) if stage["step"] < config.extended[-1]]
    fields = {"steps": config.steps, "extended": list(config.extended)}
    if begun == theirs.get("context", []) != ours.get("context", []):
        fields["context"] = ours["context"]
    return fields


def _write_json(path: pathlib.Path, value: Any) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(value, indent=1))
    fresh.replace(path)


def _agree(value: dict[str, Any], name: str) -> None:
    every = processes.gather(value)
    for process, other in enumerate(every):
        if lines := differences(every[0], other):
            raise ValueError(
                f"all processes of a run need the same {name}; process {process} differs from "
                f"process 0: {'; '.join(lines)}"
            )


def _check_shared(out_dir: pathlib.Path) -> None:
    """Refuse a folder that is another one on each host, before anything is computed."""
    if not processes.several():
        return
    mark = out_dir / processes.decide(f".shared-{uuid.uuid4().hex}")
    processes.by_first(mark.touch)
    blind = [i for i, seen in enumerate(processes.gather(_appears(mark))) if not seen]
    processes.by_first(mark.unlink)
    if blind:
        raise ValueError(
            f"out_dir must be one folder for all processes; process {', '.join(map(str, blind))} "
            f"cannot see what process 0 writes into {out_dir}. Use a path on a file system that "
            "all hosts mount (NFS, Lustre, Filestore, gcsfuse)"
        )


def _appears(path: pathlib.Path) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return path.exists()
