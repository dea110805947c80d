# SPDX-License-Identifier: Apache-2.0
"""The cache of multi-head latent attention: one latent and one key part a token, for all heads.

It is a `KVCache` whose layers hold `[B, S, 1, latent + key part]`, sharded over slots and the same
over `model`, and no values: those are made of the latent. `Prefill.latent` sends latents around as
`latent_attention` does; `Extend.latent` leaves them where they lie (one all-gather a layer:
`shards * B * T * N * (latent + 1)` float32).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxcp.attention.cache import AXIS, KVCache, empty_cache


def empty_latent_cache(
    *, layers: int, batch_size: int, max_len: int, size: int, dtype, index_size: int = 0
) -> KVCache:
    """A cache for `max_len` tokens a row of `size` channels, on the mesh in scope.

    `index_size`: channels of an index key, beside each latent; 0 where there is no index.
    """
    frame = empty_cache(
        layers=0, batch_size=batch_size, max_len=max_len, num_kv_heads=1, head_dim=size, dtype=dtype
    )

    @functools.partial(jax.jit, static_argnums=0)
    def zeros(size):
        x = jnp.zeros((*frame.positions.shape, 1, size), dtype)
        mesh = jax.sharding.get_abstract_mesh()
        return x if mesh.empty else jax.sharding.reshard(x, P("data", AXIS, None, None))

    held = tuple(zeros(size) for _ in range(layers))
    index = tuple(zeros(index_size) for _ in range(layers if index_size else 0))
    return dataclasses.replace(frame, k=held, v=index, windows=(None,) * layers)
