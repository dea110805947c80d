# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention whose output is gated, with zero-centred QK norms: Qwen3-Next."""

import jax
from flax import nnx

from jaxcp.layers.attention import Attention
from jaxcp.layers.linear import linear
from jaxcp.layers.norm import ZeroCentredRMSNorm
from jaxcp.layers.parameter import constant, normal
from jaxcp.sharding import tokens_spec


class GatedAttention(Attention):
    """Each head's output is multiplied by the sigmoid of a projection, channel by channel.

    `use_bias`: of q, k, v, the gate and the output.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        std: float,
        norm_eps: float,
        use_bias: bool = False,
        rngs: nnx.Rngs,
        **options,
    ):
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, std=std, use_bias=use_bias, rngs=rngs,
            **options,
        )  # fmt: skip
        shape, axes = (embed_dim, num_heads, head_dim), ("embed", "heads", "head_dim")
        self.gate = normal(rngs, shape, axes, std, summed=1)
        if use_bias:
            self.gate_bias = constant(shape[1:], axes[1:], 0.0)
        for name in ("q_norm", "k_norm"):
            setattr(self, name, ZeroCentredRMSNorm(head_dim, eps=norm_eps, axis="head_dim"))
        self.qk_norm = True

    @jax.named_scope("attention")
    def __call__(self, x, positions, attend):
        q, k, v = self._qkv(x, positions)
        gate = linear("btd,dnh->btnh", x, self.gate)
        if self.use_bias:
            gate = gate + self.gate_bias.astype(x.dtype)
        with jax.named_scope("attend"):
            out = attend(q, k, v, window=self.window)
        return self._output(out * jax.nn.sigmoid(gate), tokens_spec(x))
