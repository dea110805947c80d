# SPDX-License-Identifier: Apache-2.0
"""Import this before flax: it refuses a flax that cannot be imported beside the installed jax.

Such a flax ends in an AttributeError about `jax.experimental.hijax`, which names neither. The
metadata of jaxcp excludes these pairs; an environment can still hold one, since pip leaves in place
what it did not install in the same call. Nothing in `context_parallel` needs flax or this check.
"""

import re
from importlib import metadata

FIRST_JAX_TOO_NEW: dict[tuple[int, ...], tuple[int, ...]] = {
    (0, 12, 8): (0, 11, 1),
    (0, 12, 9): (0, 11, 2),
}
"""Maps a flax to the first jax that lacks a name that it imports. Later ones import on 0.12."""


def check(flax: str, jax: str) -> None:
    """Refuse a pair of versions that cannot work.

    Raises:
      ImportError: with both versions, and which ones work together.
    """
    limit = FIRST_JAX_TOO_NEW.get(_numbers(flax))
    if limit is not None and _numbers(jax) >= limit:
        raise ImportError(
            f"flax {flax} cannot be imported beside jax {jax}: it needs "
            f"jax<{'.'.join(map(str, limit))}. Install flax>=0.12.10, or that jax"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _check_installed() -> None:
    try:
        versions = metadata.version("flax"), metadata.version("jax")
    except metadata.PackageNotFoundError:
        return  # the import itself says which one is missing
    check(*versions)


_check_installed()
