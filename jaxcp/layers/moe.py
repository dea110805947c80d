# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts as Hy3 and DeepSeek-V3 route: sigmoid scores, a bias that only selects, top-k.

No token is ever dropped: tokens are sorted by expert and every group is multiplied whole. Each
device routes the tokens it holds; expert widths are split over the model axis.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcp.layers.mlp import GatedMLP
from jaxcp.layers.parameter import RouterBias, normal
from jaxcp.sharding import tokens_spec
from pallas_kernels import grouped_matmul, grouped_swiglu


class MoE(nnx.Module):
    def __init__(
        self,
        embed_dim: int,
        moe_dim: int,
        *,
        num_experts: int,
        num_experts_per_tok: int,
        num_shared_experts: int,
        route_norm: bool,
        route_scale: float,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
    ):
        self.router = normal(rngs, (embed_dim, num_experts), ("embed", "experts"), std)
        self.router_bias = RouterBias(jnp.zeros((num_experts,), jnp.float32), axes=("experts",))
        self.gate = normal(
            rngs, (num_experts, embed_dim, moe_dim), ("experts", "embed", "mlp"), std
        )
        self.up = normal(rngs, (num_experts, embed_dim, moe_dim), ("experts", "embed", "mlp"), std)
        self.down = normal(
            rngs, (num_experts, moe_dim, embed_dim), ("experts", "mlp", "embed"), out_std
        )
        if num_shared_experts:
            self.shared = GatedMLP(
                embed_dim, num_shared_experts * moe_dim, std=std, out_std=out_std, rngs=rngs
            )
        self.num_experts_per_tok, self.num_shared_experts = num_experts_per_tok, num_shared_experts
        self.route_norm, self.route_scale = route_norm, route_scale

    def __call__(self, x):
        """`(y [B, T, D], load [E])`: load is the fraction of choices that fell on each expert."""
        weights = [w.astype(x.dtype) for w in (self.gate, self.up, self.down)]
        router = self.router.astype(jnp.float32), self.router_bias.astype(jnp.float32)
        spec = tokens_spec(x)
        if spec is None:
            y, load = self._routed(x, *router, *weights, axes=(), model_axis=None)
        else:
            tokens = P(*spec, None)
            axes = tuple(jax.tree.leaves(tuple(spec)))
            wide = P(None, None, "model"), P(None, None, "model"), P(None, "model", None)

            def local(*args):
                return self._routed(*args, axes=axes, model_axis="model")

            ins, outs = (tokens, P(), P(), *wide), (tokens, P())
            y, load = jax.shard_map(local, in_specs=ins, out_specs=outs)(x, *router, *weights)
        return (y + self.shared(x) if self.num_shared_experts else y), load

    def _routed(self, x, router, bias, gate, up, down, *, axes, model_axis):
        """The routed experts' sum over local tokens."""
        b, t, d = x.shape
        k, num_experts = self.num_experts_per_tok, router.shape[1]
        flat = x.reshape(b * t, d)
        chosen, weights = self._route(flat, router, bias)
        order = jnp.argsort(chosen.reshape(-1))  # stable: choices of one expert stay in token order
        sizes = jnp.bincount(chosen.reshape(-1), length=num_experts).astype(jnp.int32)
        rows = flat[order // k]
        out = grouped_matmul(grouped_swiglu(rows, gate, up, sizes), down, sizes)
        out = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(b * t, k, d)
        y = jnp.einsum("mkd,mk->md", out.astype(jnp.float32), weights)
        load = sizes.astype(jnp.float32) / (b * t * k)
        if model_axis is not None:
            y = lax.psum(y, model_axis)
        if axes:
            load = lax.pmean(load, axes)
        return y.astype(x.dtype).reshape(b, t, d), load

    def _route(self, x, router, bias):
        """Top-k experts `[M, k]` and their float32 weights. The bias selects and does not weigh."""
        logits = jnp.einsum(
            "md,de->me", x.astype(jnp.float32), router, precision=lax.Precision.HIGHEST
        )
        scores = jax.nn.sigmoid(logits)
        _, chosen = lax.top_k(lax.stop_gradient(scores + bias), self.num_experts_per_tok)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.route_norm:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return chosen, weights * self.route_scale
