# SPDX-License-Identifier: Apache-2.0
"""An embedding that sees the tokens before: small vectors of the last few, projected and added.

It takes windows of ids, which `jaxcp.data.windows` makes; an id below 0 is no token.
"""

import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.parameter import normal
from jaxcp.sharding import tokens_spec


class NGram(nnx.Module):
    """`sum_i table[window_i] @ proj_i`. Source: character convolutions (arXiv 1508.06615)."""

    def __init__(self, vocab_size: int, dim: int, width: int, embed_dim: int, *, rngs: nnx.Rngs):
        self.table = normal(rngs, (vocab_size, dim), ("vocab", "ngram"), 1.0)
        std = (width * dim) ** -0.5
        self.proj = normal(rngs, (width, dim, embed_dim), ("window", "ngram", "embed"), std)

    def __call__(self, window, dtype):
        spec = tokens_spec(window)
        sharding = None if spec is None else type(spec)(*spec, None, None)
        rows = self.table.at[window].get(mode="clip", out_sharding=sharding)
        rows = jnp.where((window >= 0)[..., None], rows, 0).astype(dtype)
        return jnp.einsum("btwc,wcd->btd", rows, self.proj.astype(dtype))
