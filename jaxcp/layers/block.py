# SPDX-License-Identifier: Apache-2.0
"""A layer of a decoder: attention, then an MLP or experts, each on a norm of the stream."""

from typing import Any

from flax import nnx

from jaxcp.layers.moe import MoE


class ResidualBlock(nnx.Module):
    """Adds attention and then the MLP to the stream; a model's block makes the four parts."""

    attention_norm: Any
    attention: Any
    mlp_norm: Any
    mlp: Any

    def __call__(self, x, positions, attend):
        """`(x [B, T, D], what the router did)`; None where the MLP is dense."""
        x = x + self.attention(self.attention_norm(x), positions, attend)
        y, stats = self.mlp_norm(x), None
        if isinstance(self.mlp, MoE):
            y, stats = self.mlp(y, positions=positions)
        else:
            y = self.mlp(y)
        return x + y, stats
