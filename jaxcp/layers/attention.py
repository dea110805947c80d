# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention: projections, optional QK norm, optional rotary positions.

Who sees whom, over which devices, and whether there is a cache is not known here: `attend` is
given q, k, v and answers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcp.attention.cache import Room
from jaxcp.attention.full import Full
from jaxcp.attention.window import Window
from jaxcp.layers.linear import linear
from jaxcp.layers.norm import RMSNorm
from jaxcp.layers.parameter import constant, normal
from jaxcp.layers.rope import Rope, rotate
from jaxcp.sharding import tokens_spec


class Attention(nnx.Module):
    """`use_bias`: of q, k, v, and of the output where `output_bias` does not say otherwise.

    `qk_norm_together`: QK norm is over all heads of a token, not over each. `value_dim`: channels
    of a value, where not `head_dim`. `value_scale` multiplies values.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        std: float,
        out_std: float,
        value_dim: int | None = None,
        value_scale: float = 1.0,
        qk_norm_eps: float | None = None,
        qk_norm_together: bool = False,
        qk_gain: float = 1.0,
        rope: Rope | None = None,
        window: int | None = None,
        use_bias: bool = False,
        output_bias: bool | None = None,
        sinks: bool = False,
        rngs: nnx.Rngs,
    ):
        value_dim = head_dim if value_dim is None else value_dim
        q, kv_axes = (embed_dim, num_heads, head_dim), ("embed", "kv_heads", "head_dim")
        self.q = normal(rngs, q, ("embed", "heads", "head_dim"), std, summed=1)
        self.k = normal(rngs, (embed_dim, num_kv_heads, head_dim), kv_axes, std, summed=1)
        self.v = normal(rngs, (embed_dim, num_kv_heads, value_dim), kv_axes, std, summed=1)
        o = num_heads, value_dim, embed_dim
        self.o = normal(rngs, o, ("heads", "head_dim", "embed"), out_std, summed=2)
        if use_bias:
            self.q_bias = constant((num_heads, head_dim), ("heads", "head_dim"), 0.0)
            self.k_bias = constant((num_kv_heads, head_dim), ("kv_heads", "head_dim"), 0.0)
            self.v_bias = constant((num_kv_heads, value_dim), ("kv_heads", "head_dim"), 0.0)
        self.output_bias = use_bias if output_bias is None else output_bias
        if self.output_bias:
            self.o_bias = constant((embed_dim,), ("embed",), 0.0)
        if sinks:
            self.sinks = constant((num_heads,), ("heads",), 0.0)
        if qk_norm_eps is not None:
            options = {"eps": qk_norm_eps, "gain": qk_gain}
            self.q_norm = _qk_norm(num_heads, head_dim, "heads", qk_norm_together, options)
            self.k_norm = _qk_norm(num_kv_heads, head_dim, "kv_heads", qk_norm_together, options)
        self.use_bias, self.qk_norm, self.has_sinks = use_bias, qk_norm_eps is not None, sinks
        self.rope, self.window = rope, window
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.value_dim, self.value_scale = value_dim, value_scale

    def empty(self, room: Room, *, layers: int = 1) -> Full | Window:
        """Make what so many layers like this one keep, before the first token."""
        heads = {
            "layers": layers, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim,
            "value_dim": self.value_dim,
        }  # fmt: skip
        if self.window is None:
            return Full.empty(room, **heads)
        return Window.empty(room, window=self.window, **heads)

    @jax.named_scope("attention")
    def __call__(self, x, positions, attend):
        q, k, v = self._qkv(x, positions)
        options = {"sinks": self.sinks.astype(jnp.float32)} if self.has_sinks else {}
        with jax.named_scope("attend"):
            out = attend(q, k, v, window=self.window, **options)
        return self._output(out, tokens_spec(x))

    @jax.named_scope("qkv")
    def _qkv(self, x, positions):
        def project(name):
            y = linear("btd,dnh->btnh", x, getattr(self, name))
            return y + getattr(self, f"{name}_bias").astype(x.dtype) if self.use_bias else y

        q, k, v = project("q"), project("k"), project("v")
        v = v if self.value_scale == 1 else v * self.value_scale
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = rotate(q, positions, self.rope), rotate(k, positions, self.rope)
        return q, k, v

    @jax.named_scope("output")
    def _output(self, out, spec):
        y = linear("btnh,nhd->btd", out, self.o, spec)
        return y + self.o_bias.astype(y.dtype) if self.output_bias else y


def _qk_norm(heads: int, head_dim: int, axis: str, together: bool, options: Any) -> RMSNorm:
    """Make a norm of each head, or of all of them together."""
    if together:
        return RMSNorm(heads, head_dim, axis=(axis, "head_dim"), **options)
    return RMSNorm(head_dim, axis="head_dim", **options)
