# SPDX-License-Identifier: Apache-2.0
"""A tiny GPT whose answers vary."""

from flax import nnx

from jaxcp import GPT, GPTConfig


def talkative_gpt(max_positions):
    """A GPT over bytes; with smaller embeddings every answer is one token for ever."""
    config = GPTConfig(
        vocab_size=256, max_positions=max_positions, num_layers=1, num_heads=2, embed_dim=16
    )
    model = GPT(config, rngs=nnx.Rngs(1))
    model.embed[...] = model.embed[...] * 20
    model.position_embed[...] = model.position_embed[...] * 20
    return model
