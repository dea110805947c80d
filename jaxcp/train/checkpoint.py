# SPDX-License-Identifier: Apache-2.0
"""Training states on disk: one directory a step, which exists completely or not at all.

Orbax writes into a temporary directory and renames it; a process that dies while saving leaves
nothing that counts. A directory that was damaged later is found out when it is read, and the one
before it is used.
"""

import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)


class Restored(NamedTuple):
    step: int
    state: Any


def steps(folder: pathlib.Path) -> list[int]:
    """The steps that were saved completely, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def save(folder: pathlib.Path, step: int, state: Any, *, keep: int) -> pathlib.Path:
    """Write a tree of arrays as `folder/<step>`, then delete all but the newest `keep`.

    Returns when the files are in place: the caller may donate `state` to the next step.
    """
    target = folder.resolve() / str(step)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(target, args=ocp.args.StandardSave(_flat(state)))
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / str(old))
    return target


def restore(folder: pathlib.Path, like: Any) -> Restored | None:
    """The newest state that can be read, on the shardings of `like`; None where none was saved.

    `like` is a tree of arrays or of `ShapeDtypeStruct` with shardings; the mesh that saved may have
    been another one. Directories that cannot be read are set aside as `<step>.unreadable` once an
    older one took their place.

    Raises:
      ValueError: there are checkpoints, and none can be read. Nothing is deleted or moved.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    failed: dict[int, Exception] = {}
    for step in reversed(steps(folder)):
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                flat = reader.restore(
                    folder.resolve() / str(step), args=ocp.args.StandardRestore(_flat(abstract))
                )
        except Exception as error:  # orbax and tensorstore raise bare Exception for a damaged file
            logger.warning(
                "checkpoint %s cannot be read (%s); trying the one before",
                folder / str(step),
                error,
            )
            failed[step] = error
            continue
        for bad in failed:
            (folder / str(bad)).rename(folder / f"{bad}.unreadable")
        return Restored(
            step, jax.tree.unflatten(jax.tree.structure(like), [flat[k] for k in _flat(like)])
        )
    if failed:
        reasons = "; ".join(f"{step}: {str(error)[:200]}" for step, error in failed.items())
        raise ValueError(
            f"no checkpoint in {folder} can be read ({reasons}). Move the folder away to start anew"
        )
    return None


def _flat(tree: Any) -> dict[str, Any]:
    # Names instead of the classes of optax: what is on disk outlives them.
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
