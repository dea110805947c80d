# SPDX-License-Identifier: Apache-2.0
"""The cache of multi-head latent attention: one latent and one key part a token, for all heads.

It is a `KVCache` whose layers hold `[B, S, 1, latent + key part]`, sharded over slots and the same
over `model`, and no values: those are made of the latent. `Prefill.latent` sends latents around as
`latent_attention` does; `Extend.latent` leaves them where they lie (one all-gather a layer:
`shards * B * T * N * (latent + 1)` float32).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxcp.context_parallel.kv_cache import AXIS, KVCache, empty_cache


def empty_latent_cache(*, layers: int, batch_size: int, max_len: int, size: int, dtype) -> KVCache:
    """A cache for `max_len` tokens a row of `size` channels, on the mesh in scope."""
    frame = empty_cache(
        layers=0, batch_size=batch_size, max_len=max_len, num_kv_heads=1, head_dim=size, dtype=dtype
    )
    shape = *frame.positions.shape, 1, size

    @jax.jit
    def zeros():
        x = jnp.zeros(shape, dtype)
        mesh = jax.sharding.get_abstract_mesh()
        return x if mesh.empty else jax.sharding.reshard(x, P("data", AXIS, None, None))

    held = tuple(zeros() for _ in range(layers))
    return dataclasses.replace(frame, k=held, windows=(None,) * layers)
