# SPDX-License-Identifier: Apache-2.0
"""Compiled programs of a run on disk, so that it does not compile again when it goes on."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxcp import processes
from jaxcp.training.file_list import FILES, drop_unlisted, write_list

OPTIONS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


class Programs:
    """JAX's compilation cache in a folder, for as long as a run runs.

    JAX writes an entry in place and believes any that is there: one cut off by `kill -9` would be
    in the way for ever, one with a changed bit would be run. So the entries that the run has
    compiled are listed with hashes, and whatever the list does not confirm is deleted first. Of
    several processes the first one writes entries, as JAX has it, and lists them.

    Args:
      folder: None, or a process that has a cache already, changes nothing.
    """

    def __init__(self, folder: pathlib.Path | None):
        used = jax.config.jax_compilation_cache_dir is not None  # type: ignore[attr-defined]
        self.folder = None if used else folder
        self._listed: set[str] = set()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Read and write programs there until the end of the block."""
        if self.folder is None:
            yield
            return
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        processes.by_first(lambda: drop_unlisted(folder))
        before = {name: getattr(jax.config, name) for name in OPTIONS}
        try:
            self._configure(OPTIONS | {"jax_compilation_cache_dir": str(self.folder)})
            yield
        finally:
            self._configure(before)

    def note(self) -> None:
        """List what was compiled since; while nothing compiles."""
        if self.folder is None or not processes.is_first():
            return
        names = {path.name for path in self.folder.rglob("*")} - {FILES}
        if names != self._listed:
            write_list(self.folder)
            self._listed = names

    def _configure(self, options: dict) -> None:
        compilation_cache.reset_cache()  # JAX looks at its options once
        for name, value in options.items():
            jax.config.update(name, value)
