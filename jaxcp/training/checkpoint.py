# SPDX-License-Identifier: Apache-2.0
"""Training states on disk: one directory a step, which exists completely or not at all.

Orbax writes into a temporary directory and renames it; then `files.json`, the sizes and hashes of
its files, makes it count. A process that dies while saving leaves nothing that counts. A directory
that was damaged later is noticed when it is read, and the one before it is used.

Several processes share the folder: each writes the shards of its devices, and the first one makes
them count and tidies up. Each reads its own shards, and all of them the same step.
"""

import contextlib
import functools
import itertools
import logging
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxcp import processes
from jaxcp.training.file_list import FILES, Damaged, check_list, sync, write_list

logger = logging.getLogger(__name__)

TEMPORARY = ".orbax-checkpoint-tmp"
PAUSES = (0.5, 2.0)
"""Seconds before a state that could not be read is read again."""

_saves = itertools.count()
"""Numbers of the saves of this process: of several processes the same ones."""


class Restored(NamedTuple):
    step: int
    state: Any


def steps(folder: pathlib.Path) -> list[int]:
    """List the steps that were saved completely, oldest first."""
    if not folder.is_dir():
        return []
    names = (path.parent.name for path in folder.glob(f"*/{FILES}"))
    return sorted(int(name) for name in names if _is_step(name))


class Saver:
    """Writes states as `folder/<step>`, one at a time, while the run goes on.

    The newest `keep` stay and those of steps that `keep_every` divides; the others go once a newer
    one has reached the disk, and so do the remains of dead processes. Leaving the block waits for
    the last state; an error of it is raised, or logged where another is on its way.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int, keep_every: int | None = None):
        self.folder, self.keep, self.keep_every = folder.resolve(), keep, keep_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jaxcp-save")
        self._running: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.wait()
        except OSError as failed:
            if error is None:
                raise
            logger.error("%s", failed)
        finally:
            self._pool.shutdown()

    def save(self, step: int, state: Any) -> pathlib.Path:
        """Copy a tree of arrays to the host, from where it is written meanwhile.

        The caller may donate `state` to the next step.

        Raises:
          OSError: this or the last state could not be written; nothing of it is left.
        """
        self.wait()
        target = self.folder / str(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        if processes.is_first():  # the others wait for it as orbax begins
            self._clear()
        with self._or_nothing(target):
            free, size = shutil.disk_usage(self.folder).free, _bytes(state)
            if free < size:
                raise OSError(f"it has {size:,} bytes")
            # orbax's barriers have the name of the step, which another folder may save meanwhile
            prefix = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=f"{next(_saves)}")
            writer = ocp.AsyncCheckpointer(
                ocp.StandardCheckpointHandler(multiprocessing_options=prefix),
                multiprocessing_options=prefix,
            )
            writer.save(target, args=ocp.args.StandardSave(_flat(state)))
        self._running = self._pool.submit(self._finish, writer, target)
        return target

    def check(self) -> None:
        """Raise the error of a save that has failed meanwhile; do not wait for one."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last state is on the disk.

        Raises:
          OSError: it could not be written; nothing of it is left.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _finish(self, writer: ocp.AsyncCheckpointer, target: pathlib.Path) -> None:
        with self._or_nothing(target):
            with contextlib.closing(writer):
                writer.wait_until_finished()
            if not processes.is_first():
                return
            write_list(target)
        saved = steps(self.folder)
        apart = {step for step in saved if self.keep_every and step % self.keep_every == 0}
        for step in {*saved[: -self.keep]} - apart:
            (self.folder / str(step) / FILES).unlink()  # first, so that half a folder never counts
        self._clear()

    @contextlib.contextmanager
    def _or_nothing(self, target: pathlib.Path) -> Iterator[None]:
        """Leave nothing of a state that could not be written, and say so in one line."""
        try:
            with _orbax_silent():
                yield
        except Exception as error:  # tensorstore raises what it likes where a disk is full
            if processes.is_first():
                self._clear()
            raise OSError(
                f"checkpoint {target} cannot be saved: {_reason(error)}; the disk has "
                f"{shutil.disk_usage(self.folder).free:,} bytes free. Make room and run it again: "
                "it goes on from the checkpoint before"
            ) from error

    def _clear(self) -> None:
        """Delete directories that do not count."""
        names = [path for path in self.folder.iterdir() if _is_step(path.name)]
        half = [path for path in names if not (path / FILES).exists()]
        for path in (*half, *self.folder.glob(f"*{TEMPORARY}*")):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f"*.{FILES}"):
            path.unlink()


def save(
    folder: pathlib.Path, step: int, state: Any, *, keep: int, keep_every: int | None = None
) -> pathlib.Path:
    """Write a state as a `Saver` does, and wait until it is on the disk."""
    with Saver(folder, keep=keep, keep_every=keep_every) as saver:
        return saver.save(step, state)


def restore(folder: pathlib.Path, like: Any) -> Restored | None:
    """Read the newest state that is whole, on the shardings of `like`; None where none was saved.

    `like` is a tree of arrays or of `ShapeDtypeStruct` with shardings; the mesh that saved may have
    been another one. Directories that cannot be read are set aside as `<step>.unreadable` once an
    older one has taken their place.

    Raises:
      ValueError: there are checkpoints, and none can be read. Nothing is deleted or moved.
    """
    failed: dict[int, Exception] = {}
    for step in reversed(processes.decide(steps(folder))):
        try:
            state = read(folder, step, like)
        except Exception as error:  # tensorstore raises bare Exception for a damaged file
            logger.warning(
                "checkpoint %s cannot be read (%s); trying the one before",
                folder / str(step),
                error,
            )
            failed[step] = error
            continue
        processes.by_first(functools.partial(_set_aside, folder, [*failed]))
        return Restored(step, state)
    if failed:
        reasons = "; ".join(f"{step}: {str(error)[:200]}" for step, error in failed.items())
        raise ValueError(
            f"no checkpoint in {folder} can be read ({reasons}). Move the folder away to start anew"
        )
    return None


def _set_aside(folder: pathlib.Path, unreadable: list[int]) -> None:
    for step in unreadable:
        aside = folder / f"{step}.unreadable"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / str(step)).rename(aside)
        sync(folder)


def read(folder: pathlib.Path, step: int, like: Any) -> Any:
    """Read the state of a step, on the shardings of `like`.

    A disk that fails to read is asked again, after `PAUSES`.

    Raises:
      Damaged: a file is not as it was written.
      Exception: it cannot be read, here or in another process; tensorstore raises a bare one.
    """
    saved = folder / str(step)
    # Before orbax: it restores wrong numbers from a changed file, and on one that is missing or cut
    # off it fails in threads that nobody waits for.
    processes.together(functools.partial(_patiently, _check, saved))
    return processes.together(functools.partial(_patiently, _read, saved, like))


def _patiently(act: Callable[..., Any], folder: pathlib.Path, *arguments: Any) -> Any:
    for pause in PAUSES:
        try:
            return act(folder, *arguments)
        except Damaged:
            raise
        except Exception as error:
            logger.warning("%s: %s; trying again", folder, _reason(error))
            time.sleep(pause)
    return act(folder, *arguments)


def _check(folder: pathlib.Path) -> None:
    check_list(folder, part=jax.process_index(), parts=jax.process_count())


def _read(folder: pathlib.Path, like: Any) -> Any:
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    # One process may fail to read: the others must not wait for it inside orbax.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        arguments = ocp.args.StandardRestore(_flat(abstract))
        flat = reader.restore(folder.resolve(), args=arguments)
    return jax.tree.unflatten(jax.tree.structure(like), [flat[key] for key in _flat(like)])


@contextlib.contextmanager
def _orbax_silent() -> Iterator[None]:
    """Drop what orbax and its threads log of an error that is raised too."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "concurrent.futures")]

    def drop(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    for one in loggers:
        one.addFilter(drop)
    try:
        yield
    finally:
        for one in loggers:
            one.removeFilter(drop)


def _reason(error: Exception) -> str:
    """Give the error of the operating system in a message of tensorstore's, or its beginning."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else f"{error}"[:200]


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _flat(tree: Any) -> dict[str, Any]:
    # Names instead of the classes of optax: what is on disk outlives them.
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
