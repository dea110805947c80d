# SPDX-License-Identifier: Apache-2.0
"""Training states on disk: one directory a step, which exists completely or not at all.

Orbax writes into a temporary directory and renames it; then `files.json`, the sizes of its files,
makes it count. A process that dies while saving leaves nothing that counts. A directory that was
damaged later is noticed when it is read, and the one before it is used.
"""

import json
import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxcp.input_files import read_json

logger = logging.getLogger(__name__)

FILES = "files.json"


class Restored(NamedTuple):
    step: int
    state: Any


def steps(folder: pathlib.Path) -> list[int]:
    """List the steps that were saved completely, oldest first."""
    if not folder.is_dir():
        return []
    names = (path.parent.name for path in folder.glob(f"*/{FILES}"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def save(folder: pathlib.Path, step: int, state: Any, *, keep: int) -> pathlib.Path:
    """Write a tree of arrays as `folder/<step>`, then delete all but the newest `keep`
    and the remains of dead processes.

    Returns when the files are in place: the caller may donate `state` to the next step.
    """
    target = folder.resolve() / str(step)
    if target.exists() and not (target / FILES).exists():
        shutil.rmtree(target)  # a process died between the renaming and the list
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(target, args=ocp.args.StandardSave(_flat(state)))
    fresh = folder / f"{step}.{FILES}"
    fresh.write_text(json.dumps(_sizes(target), indent=1))
    fresh.replace(target / FILES)
    old = [folder / str(step) for step in steps(folder)[:-keep]]
    for path in [*old, *folder.glob("*.orbax-checkpoint-tmp*")]:
        shutil.rmtree(path)
    return target


def restore(folder: pathlib.Path, like: Any) -> Restored | None:
    """Read the newest state that is whole, on the shardings of `like`; None where none was saved.

    `like` is a tree of arrays or of `ShapeDtypeStruct` with shardings; the mesh that saved may have
    been another one. Directories that cannot be read are set aside as `<step>.unreadable` once an
    older one has taken their place.

    Raises:
      ValueError: there are checkpoints, and none can be read. Nothing is deleted or moved.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    failed: dict[int, Exception] = {}
    for step in reversed(steps(folder)):
        try:
            _check_sizes(folder / str(step))
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                flat = reader.restore(
                    folder.resolve() / str(step), args=ocp.args.StandardRestore(_flat(abstract))
                )
        except Exception as error:  # tensorstore raises bare Exception for a damaged file
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


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _check_sizes(folder: pathlib.Path) -> None:
    # Before orbax: on a file that is missing or cut off it fails in threads that nobody waits for.
    expected, actual = read_json(folder / FILES), _sizes(folder)
    wrong = [
        f"{name} has {actual.get(name, 0)} of {size} bytes"
        for name, size in expected.items()
        if actual.get(name) != size
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def _flat(tree: Any) -> dict[str, Any]:
    # Names instead of the classes of optax: what is on disk outlives them.
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
