# SPDX-License-Identifier: Apache-2.0
"""Sizes of an engine's pool and batches: of what the model keeps, the mesh, and the memory."""

import dataclasses
import itertools
import logging
import math
import numbers
from typing import Any, NamedTuple

import jax

from jaxcp.inference.checks import integer
from jaxcp.inference.limits import HostLimits
from pallas_kernels.dispatch import target_platform

log = logging.getLogger(__name__)

PAGE = {"cpu": 32, "gpu": 64, "tpu": 256}
"""Tokens of a page: a block of the decode kernel, or a part of one."""
SMALL_POOL = 32_768
"""Tokens of a pool for several requests, where nothing is said of its size."""
FEW = 8
"""Tokens of a row in a step that looks at guesses: the latest, and guesses."""
SHORT = (8, 32, 64)
"""Tokens of a chunk that every device computes."""
WIDTHS = (128, 512, 2048)
"""Tokens a shard of the chunks that are sharded."""
TOGETHER = 8
"""Rows of the program that computes short chunks of several."""
DRAFTED = 3
"""Tokens that a layer of the model drafts at a time at most: later ones are seldom right."""
OF_A_TOKEN = 8 + 1 / 8
"""Bytes of a row beside the pool for each token there is: its count, its bias, a grammar's bit."""
STATES = 4
"""States for each row: what rows do not have holds snapshots."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a pool and its batches that never change."""

    groups: int = 1
    """Groups of devices that share nothing; pages, states and rows are those of each."""
    shards: int
    pages_per_shard: int
    page_size: int
    states: int
    max_rows: int
    listed: int
    """Pages of a row on a shard at most."""
    ngram: int = 1
    """Tokens that the embedding of one token sees."""
    drafts: int = 0
    """Tokens of a row that are guessed in a step at most."""
    drafting: int = 0
    """Tokens that the model's own layer drafts in a step."""
    cache_dtype: str | None = None
    """The format of keys and values in pages; None: the model's dtype."""
    host: HostLimits | None = None
    """Room on the host for what each group evicts."""

    @property
    def seats(self) -> int:
        """Rows of all groups."""
        return self.groups * self.max_rows

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Rows of the steps of decoding that there are."""
        few = itertools.takewhile(lambda size: size < self.max_rows, (1, 4, 16, 64, 256))
        return (*few, self.max_rows)

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Tokens of chunks, up to one that takes the longest prompt at once."""
        short = SHORT[-1:] if self.drafts else SHORT  # to bound the number of programs
        sizes = (*short, *(width * self.shards for width in WIDTHS))
        enough = [size for size in sizes if size >= self.longest]
        return tuple(size for size in sizes if not enough or size <= enough[0])

    @property
    def longest(self) -> int:
        """Tokens of a row at most, in whole pages of every shard."""
        return self.shards * self.listed * self.page_size

    @property
    def together(self) -> "Together | None":
        """The program for chunks of several rows; None where there is one row, or no room.

        It may copy a layer's pages of all of them: as many as of one row of the longest, or of
        `SMALL_POOL` tokens where that is more.
        """
        rows = min(TOGETHER, self.max_rows)
        most = max(self.longest, SMALL_POOL) // (rows * self.shards * self.page_size)
        if rows == 1 or most == 0:
            return None
        zigzag = 2 * self.shards
        tokens = min(-(-WIDTHS[0] // zigzag) * zigzag, self.chunk_sizes[-1])
        narrow = dataclasses.replace(self, listed=min(self.listed, most))
        return Together(rows, tokens, narrow)

    @property
    def pool_tokens(self) -> int:
        """Tokens that the pool has room for."""
        return self.groups * self.shards * self.pages_per_shard * self.page_size

    def room(self) -> dict[str, Any]:
        """The arguments of `LanguageModel.init_pool`."""
        return {
            "pages": self.pages_per_shard,
            "page": self.page_size,
            "states": self.states,
            **_pool_options(self.drafts, self.drafting, self.cache_dtype),
        }


class Together(NamedTuple):
    """Sizes of a program for chunks of several rows."""

    rows: int
    """Rows of each group of devices."""
    tokens: int
    """Tokens of each row."""
    geometry: Geometry
    """Sizes of the rows, which are no longer than `geometry.longest`."""


def geometry_of(
    model: Any,
    *,
    max_len: int,
    max_rows: int,
    pool_tokens: int | None,
    memory: int | float | None,
    cache_dtype: str | None,
    drafts: int = 0,
    host_memory: int = 0,
) -> Geometry:
    """The sizes of an engine on the mesh in scope; the arguments are those of `Engine`.

    Raises:
      ValueError: no `cache_dtype`, a `memory` that one request of `max_len` does not fit, or a
        `host_memory` that a page does not fit.
      NotImplementedError: a model that cannot have such a cache.
    """
    axes = jax.sharding.get_abstract_mesh().shape
    groups, shards, page = axes.get("data", 1), axes.get("seq", 1), PAGE[target_platform()]
    max_rows = math.ceil(max_rows / groups)
    drafting = min(drafts, DRAFTED) if getattr(model.config, "num_mtp_layers", 0) else 0
    options = _pool_options(drafts, drafting, cache_dtype)
    smallest = jax.eval_shape(lambda: model.init_pool(pages=1, page=page, states=1, **options))
    if drafts and not smallest.rolls_back:
        raise NotImplementedError(
            f"drafts={drafts}: layers of this model keep a state that cannot take a wrong guess "
            "back; leave drafts out"
        )
    if pool_tokens is None:
        pool_tokens = groups * max(max_len, min(4 * max_len, SMALL_POOL))
    geometry = Geometry(
        groups=groups,
        shards=shards,
        page_size=page,
        pages_per_shard=math.ceil(pool_tokens / (page * shards * groups)),
        states=STATES * max_rows if smallest.keeps_state else 0,
        max_rows=max_rows,
        listed=math.ceil(math.ceil(max_len / page) / shards),
        ngram=getattr(model.config, "ngram_width", 1),
        drafts=drafts,
        drafting=drafting,
        cache_dtype=cache_dtype,
        host=_on_host(smallest, host_memory // groups, axes) if host_memory else None,
    )
    if memory is not None:
        beside = max_rows * model.config.vocab_size * OF_A_TOKEN
        geometry = _filling(geometry, smallest, _bytes(memory), math.ceil(beside))
    size = smallest.bytes_of(geometry.pages_per_shard, geometry.states)
    log.info(
        "pool: %s tokens in pages of %d, %.3f GiB a device",
        f"{geometry.pool_tokens:,}", page, size / 2**30,
    )  # fmt: skip
    return geometry


def _pool_options(drafts, drafting, cache_dtype) -> dict[str, Any]:
    back = FEW + DRAFTED if drafts else 0
    return {"cache_dtype": cache_dtype, "drafting": drafting > 0, "rolled_back": back}


def _on_host(smallest, size, axes) -> HostLimits:
    """Room on the host for blocks of one group: of a page by all devices that have it, of a state
    by one shard's."""
    devices = axes.get("model", 1) * axes.get("expert", 1)
    page_bytes = devices * smallest.bytes_of(1, 0)
    return HostLimits(
        size=size,
        page_bytes=page_bytes or smallest.page,  # so that no block is free of charge
        state_bytes=devices * smallest.bytes_of(0, 1),
    )


def _filling(geometry, smallest, memory, beside) -> Geometry:
    """The geometry with as many pages as memory has room for, `beside` bytes and states."""
    beside, page = beside + smallest.bytes_of(0, geometry.states), smallest.bytes_of(1, 0)
    if not page:
        return geometry
    pages = (memory - beside) // page
    if pages < geometry.listed:
        raise ValueError(
            f"one request of max_len takes {beside + geometry.listed * page:,} bytes a device; "
            f"memory is {memory:,}. Give more, or a smaller max_len or max_rows"
        )
    return dataclasses.replace(geometry, pages_per_shard=pages)


def check_memory(memory: Any, pool_tokens: int | None) -> None:
    """Raise ValueError unless `memory` is bytes, or a fraction, or None."""
    if memory is None:
        return
    if pool_tokens is not None:
        raise ValueError("the pool has a size by pool_tokens or by memory; give one")
    if isinstance(memory, numbers.Integral):
        integer("memory", memory, 1)
    elif not isinstance(memory, float) or not 0 < memory < 1:
        raise ValueError(
            "memory must be bytes of a device (an integer) or a fraction of what is free (between "
            f"0 and 1); got {memory!r}"
        )


def _bytes(memory) -> int:
    """The bytes of a device that the pool may take."""
    if isinstance(memory, numbers.Integral):
        return int(memory)
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise ValueError(
            f"{device.device_kind} does not tell how much memory it has: give memory in bytes, "
            "or pool_tokens"
        )
    return int(memory * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
