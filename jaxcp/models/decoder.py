# SPDX-License-Identifier: Apache-2.0
"""A plain decoder: a table of embeddings, blocks that differ by their number, a norm and a head."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.norm import RMSNorm
from jaxcp.layers.parameter import normal
from jaxcp.layers.stack import Layers
from jaxcp.models.base import LanguageModel, embed


class Decoder(LanguageModel):
    """A model whose family says what its blocks are.

    `model(tokens, positions)` gives float32 logits `[B, T, V]`; `jaxcp.logits` and an `Engine` see
    to layout and padding.
    """

    block: ClassVar[Callable[..., Any]]
    """Makes a block of the configuration, its number, and `rngs`."""
    norm: ClassVar[Callable[..., Any]] = RMSNorm

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.config = config
        table = config.vocab_size, config.embed_dim
        std = 0.02 if config.tie_embeddings else 1.0
        self.embed = normal(rngs, table, ("vocab", "embed"), std)
        block, norm = type(self).block, type(self).norm
        self.layers = Layers([block(config, i, rngs) for i in range(config.num_layers)])
        self.final_norm = norm(config.embed_dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = normal(rngs, table[::-1], ("embed", "vocab"), 0.01)

    def embedded(self, tokens, positions):
        del positions  # attention turns by them, or no layer does
        return embed(self.embed, tokens, jnp.dtype(self.config.dtype))
