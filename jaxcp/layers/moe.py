# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: a router, gated experts, and shared experts that every token goes through.

No token is ever dropped: tokens are sorted by expert and every group is multiplied whole. Each
device routes the tokens it holds; expert widths are split over the model axis.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcp.layers.mlp import SILU, GatedMLP, SwiGLU
from jaxcp.layers.parameter import RouterBias, constant, normal
from jaxcp.layers.routing import SCORES, Routing
from jaxcp.sharding import spec_of, tokens_spec
from pallas_kernels import grouped_matmul, grouped_swiglu


class MoE(nnx.Module):
    """`use_bias`: the experts' projections (not the shared ones') have biases, as gpt-oss has."""

    def __init__(
        self,
        embed_dim: int,
        moe_dim: int,
        *,
        num_experts: int,
        num_experts_per_tok: int,
        num_shared_experts: int = 0,
        routing: Routing,
        activation: SwiGLU = SILU,
        use_bias: bool = False,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
    ):
        wide, narrow = (num_experts, embed_dim, moe_dim), (num_experts, moe_dim, embed_dim)
        self.router = normal(rngs, (embed_dim, num_experts), ("embed", "experts"), std)
        if routing.selection_bias:
            self.router_bias = RouterBias(jnp.zeros((num_experts,), jnp.float32), axes=("experts",))
        if routing.linear_bias:
            self.router_linear_bias = constant((num_experts,), ("experts",), 0.0)
        self.gate = normal(rngs, wide, ("experts", "embed", "mlp"), std)
        self.up = normal(rngs, wide, ("experts", "embed", "mlp"), std)
        self.down = normal(rngs, narrow, ("experts", "mlp", "embed"), out_std)
        if use_bias:
            self.gate_bias = constant((num_experts, moe_dim), ("experts", "mlp"), 0.0)
            self.up_bias = constant((num_experts, moe_dim), ("experts", "mlp"), 0.0)
            self.down_bias = constant((num_experts, embed_dim), ("experts", "embed"), 0.0)
        if num_shared_experts:
            self.shared = GatedMLP(
                embed_dim,
                num_shared_experts * moe_dim,
                activation=activation,
                std=std,
                out_std=out_std,
                rngs=rngs,
            )
        self.num_experts_per_tok, self.num_shared_experts = num_experts_per_tok, num_shared_experts
        self.routing, self.activation, self.use_bias = routing, activation, use_bias

    def __call__(self, x, chosen=None):
        """`(y [B, T, D], load [E])`: load is the fraction of choices that fell on each expert.

        `chosen [B, T, k]`, laid out as x is: experts that something else has selected.
        """
        w = self._weights(x.dtype)
        spec = tokens_spec(x)
        if spec is None:
            y, load = self._routed(x, chosen, w, axes=(), model_axis=None)
        else:
            tokens = P(*spec, None)
            axes = tuple(jax.tree.leaves(tuple(spec)))
            placed = {name: spec_of(getattr(self, name).get_metadata()["axes"]) for name in w}

            def local(x, chosen, w):
                return self._routed(x, chosen, w, axes=axes, model_axis="model")

            ins = (tokens, None if chosen is None else tokens, placed)
            y, load = jax.shard_map(local, in_specs=ins, out_specs=(tokens, P()))(x, chosen, w)
        return (y + self.shared(x) if self.num_shared_experts else y), load

    def _weights(self, dtype):
        """Every leaf of the router (float32) and of the routed experts (`dtype`), by name."""
        router, experts = ["router"], ["gate", "up", "down"]
        router += ["router_bias"] if self.routing.selection_bias else []
        router += ["router_linear_bias"] if self.routing.linear_bias else []
        experts += [f"{name}_bias" for name in experts] if self.use_bias else []
        w = {name: getattr(self, name).astype(jnp.float32) for name in router}
        return w | {name: getattr(self, name).astype(dtype) for name in experts}

    def _routed(self, x, chosen, w, *, axes, model_axis):
        """The routed experts' sum over local tokens."""
        b, t, d = x.shape
        k, num_experts = self.num_experts_per_tok, w["router"].shape[1]
        flat = x.reshape(b * t, d)
        scores = self._scores(flat, w)
        if chosen is None:
            chosen = self.routing.select(scores, k, w.get("router_bias"))
        else:
            chosen = chosen.reshape(b * t, k)
        weights = self.routing.weigh(scores, chosen)
        order = jnp.argsort(chosen.reshape(-1))  # stable: choices of one expert stay in token order
        sizes = jnp.bincount(chosen.reshape(-1), length=num_experts).astype(jnp.int32)
        expert = chosen.reshape(-1)[order]
        hidden = self._activated(flat[order // k], w, expert, sizes)
        out = grouped_matmul(hidden, w["down"], sizes)
        out = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(b * t, k, d)
        y = jnp.einsum("mkd,mk->md", out.astype(jnp.float32), weights)
        load = sizes.astype(jnp.float32) / (b * t * k)
        if model_axis is not None:
            y = lax.psum(y, model_axis)
        if self.use_bias:  # after the sum over devices: once
            bias = w["down_bias"].astype(jnp.float32)[chosen]
            y = y + jnp.einsum("mkd,mk->md", bias, weights)
        if axes:
            load = lax.pmean(load, axes)
        return y.astype(x.dtype).reshape(b, t, d), load

    def _activated(self, rows, w, expert, sizes):
        """`[M * k, F]`, rows sorted by expert."""
        if self.activation.is_silu and not self.use_bias:
            limit = self.activation.limit
            return grouped_swiglu(rows, w["gate"], w["up"], sizes, clamp=limit)

        def project(name):
            y = grouped_matmul(rows, w[name], sizes)
            return y + w[f"{name}_bias"][expert] if self.use_bias else y

        return self.activation(project("gate"), project("up"))

    def _scores(self, x, w):
        """Float32 scores `[M, E]` of every expert."""
        logits = jnp.einsum(
            "md,de->me", x.astype(jnp.float32), w["router"], precision=lax.Precision.HIGHEST
        )
        if self.routing.linear_bias:
            logits = logits + w["router_linear_bias"]
        return SCORES[self.routing.scores](logits)
