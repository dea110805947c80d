# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: a router, gated experts, and shared experts that every token goes through.

No token is ever dropped: tokens are sorted by expert and every group is multiplied whole. Each
device routes the tokens it holds; expert widths are split over the model axis. Where experts lie
on a mesh axis over which tokens are sharded too, tokens travel to them (`expert_exchange`); on an
axis that tokens do not know, each device adds what its own experts say of all its tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcp.layers.expert_exchange import exchanged, zeros_after
from jaxcp.layers.fixed_tiles import experts_in_tiles, in_tiles
from jaxcp.layers.mlp import SILU, GatedMLP, SwiGLU
from jaxcp.layers.parameter import RouterBias, constant, normal
from jaxcp.layers.quantized import is_quantized
from jaxcp.layers.router_stats import RouterStats, router_stats
from jaxcp.layers.routing import SCORES, Routing
from jaxcp.layers.stack import InStack
from jaxcp.sharding import tokens_spec
from pallas_kernels import grouped_matmul, grouped_swiglu

EXPERT_WEIGHTS = ("gate", "up", "down", "gate_bias", "up_bias")
"""The weights that an expert's own device applies."""


class MoE(nnx.Module):
    """`use_bias`: the experts' projections (not the shared ones') have biases, as gpt-oss has.

    `float32_sum`: routed and shared experts are added in float32, then rounded to x's dtype.
    `shared_dim`: the width of the shared experts together, where not `moe_dim` each. `shared_gate`:
    what they say is multiplied by the sigmoid of a projection to one number, as Qwen3-Next has it.
    `reproducible`: `y` has the same bits on every mesh of one kind of device (see `fixed_tiles`);
    where expert widths are split over the model axis, a call raises NotImplementedError. Gradients
    of weights are sums over devices and have other bits.
    """

    def __init__(
        self,
        embed_dim: int,
        moe_dim: int,
        *,
        num_experts: int,
        num_experts_per_tok: int,
        num_shared_experts: int = 0,
        shared_dim: int | None = None,
        shared_gate: bool = False,
        routing: Routing,
        activation: SwiGLU = SILU,
        use_bias: bool = False,
        float32_sum: bool = False,
        reproducible: bool = False,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
    ):
        wide, narrow = (num_experts, embed_dim, moe_dim), (num_experts, moe_dim, embed_dim)
        many = {"summed": 1, "in_stack": True}
        self.router = normal(rngs, (embed_dim, num_experts), ("embed", "choices"), std)
        if routing.selection_bias:
            self.router_bias = RouterBias(jnp.zeros((num_experts,), jnp.float32), axes=("choices",))
        if routing.linear_bias:
            self.router_linear_bias = constant((num_experts,), ("choices",), 0.0)
        self.gate = normal(rngs, wide, ("experts", "embed", "mlp"), std, **many)
        self.up = normal(rngs, wide, ("experts", "embed", "mlp"), std, **many)
        self.down = normal(rngs, narrow, ("experts", "mlp", "embed"), out_std, **many)
        if use_bias:
            self.gate_bias = constant((num_experts, moe_dim), ("experts", "mlp"), 0.0)
            self.up_bias = constant((num_experts, moe_dim), ("experts", "mlp"), 0.0)
            self.down_bias = constant((num_experts, embed_dim), ("choices", "embed"), 0.0)
        if num_shared_experts:
            self.shared = GatedMLP(
                embed_dim,
                num_shared_experts * moe_dim if shared_dim is None else shared_dim,
                activation=activation,
                std=std,
                out_std=out_std,
                rngs=rngs,
            )
        if shared_gate:
            if reproducible:
                raise NotImplementedError("reproducible experts have no gated shared expert")
            self.shared_gate = normal(rngs, (embed_dim,), ("embed",), std)
        self.has_shared_gate = shared_gate
        self.num_experts_per_tok, self.num_shared_experts = num_experts_per_tok, num_shared_experts
        self.routing, self.activation, self.use_bias = routing, activation, use_bias
        self.float32_sum, self.reproducible = float32_sum, reproducible

    @jax.named_scope("moe")
    def __call__(self, x, chosen=None, *, positions=None) -> tuple[jax.Array, RouterStats]:
        """`(y [B, T, D], stats)`: what the router did with all real tokens, on every device alike.

        `chosen [B, T, k]`, laid out as x is: experts that something else has selected.
        `positions [B, T]`: tokens at `PAD_POSITION` go to experts and do not count in `stats`.
        """
        w = self._weights(x.dtype)
        spec = tokens_spec(x)
        if spec is None:
            y, stats = self._routed(x, chosen, positions, w, axes=(), experts=None, partial=())
        else:
            tokens = P(*spec, None)
            axes = tuple(jax.tree.leaves(tuple(spec)))
            placed = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, w)
            experts, width, _ = _spec(placed["down"])
            apart = experts if experts not in axes else None
            mesh = jax.sharding.get_abstract_mesh().shape
            partial = tuple(a for a in (width, apart) if a is not None and mesh[a] > 1)
            if self.reproducible and width in partial:
                raise NotImplementedError(
                    f"reproducible experts cannot be split by width: needs {width}=1; "
                    f"got {width}={mesh[width]}. Spread experts instead, over expert, seq or data"
                )

            def local(x, *given):
                return self._routed(x, *given, axes=axes, experts=experts, partial=partial)

            ins = (
                tokens,
                None if chosen is None else tokens,
                None if positions is None else spec,
                placed,
            )
            # check_vma=False: rounds of an exchange that are skipped vary over no axis
            run = jax.shard_map(local, in_specs=ins, out_specs=(tokens, P()), check_vma=False)
            y, stats = run(x, chosen, positions, w)
        if self.num_shared_experts and not self.reproducible:
            dtype = y.dtype if self.float32_sum else x.dtype
            y = y.astype(dtype) + self._shared(x).astype(dtype)
        return y.astype(x.dtype), stats

    def _shared(self, x):
        y = self.shared(x)
        if not self.has_shared_gate:
            return y
        return (
            y
            * jax.nn.sigmoid(jnp.einsum("btd,d->bt", x, self.shared_gate.astype(x.dtype)))[
                ..., None
            ]
        )

    def _weights(self, dtype):
        """Every leaf of the router (float32) and of the routed experts, by name: those in `dtype`,
        or quantized."""
        router, experts = ["router"], ["gate", "up", "down"]
        router += ["router_bias"] if self.routing.selection_bias else []
        router += ["router_linear_bias"] if self.routing.linear_bias else []
        experts += [f"{name}_bias" for name in experts] if self.use_bias else []
        w = {name: getattr(self, name).astype(jnp.float32) for name in router}
        for name in experts:
            value = getattr(self, name).get_value()
            w[name] = _in_dtype(value, dtype, self.reproducible)
        if self.reproducible and self.num_shared_experts:
            w["shared"] = self.shared
        return w

    def _routed(self, x, chosen, positions, w, *, axes, experts, partial):
        """The routed experts' sum over local tokens, float32, and what their router did.

        `axes` shard tokens, `experts` the experts; over `partial` results are parts of a sum.
        """
        b, t, d = x.shape
        num_experts = w["router"].shape[1]
        flat = x.reshape(b * t, d)
        of_rows = in_tiles if self.reproducible else _at_once
        with jax.named_scope("route"):
            logits = of_rows(lambda x: self._logits(x, w), flat)
            scores = of_rows(SCORES[self.routing.scores], logits)
            chosen, stats = self._choice(logits, scores, chosen, positions, w, axes)
            weights = of_rows(self.routing.weigh, scores, chosen)
        if experts in axes and lax.axis_size(experts) > 1:
            shared = {name: x for name, x in w.items() if name in EXPERT_WEIGHTS}
            options = {"axis_name": experts, "num_experts": num_experts}
            out = exchanged(flat, chosen, self._applied, shared, **options)
        else:
            out = self._own_experts(flat, chosen, w, experts)
        y = self._combined(out, chosen, weights, w, of_rows, partial)
        if "shared" in w:
            shared = of_rows(lambda x: w["shared"](x[None])[0], flat)
            dtype = y.dtype if self.float32_sum else x.dtype
            y = y.astype(dtype) + shared.astype(dtype)
        return y.reshape(b, t, d), stats

    @jax.named_scope("combine")
    def _combined(self, out, chosen, weights, w, of_rows, partial):
        """Sum what the experts made of each row, `out [M, k, D]`, by the router's weights."""
        if partial and self.reproducible:
            out, partial = lax.psum(out, partial), ()  # exact: each choice is of one device
        y = of_rows(_weighed, out, weights)
        if partial:
            y = lax.psum(y, partial)
        if self.use_bias:  # after the sum over devices: once
            bias = w["down_bias"].astype(jnp.float32)[chosen]
            y = y + of_rows(_weighed, bias, weights)
        return y

    @jax.named_scope("dispatch")
    def _own_experts(self, rows, chosen, w, experts):
        """`[M, k, D]`: what each choice makes of its row; 0 where its expert is elsewhere."""
        each = _number(w["down"])
        first = 0 if experts is None else lax.axis_index(experts) * each
        number = (chosen - first).reshape(-1)
        number = jnp.where((number >= 0) & (number < each), number, each)
        order = jnp.argsort(number)  # stable: choices of one expert stay in token order
        sizes = jnp.bincount(number, length=each).astype(jnp.int32)
        out = self._applied(w, rows[order // chosen.shape[1]], number[order], sizes)
        empty = zeros_after(sizes[0], out.shape, out.dtype)
        out = empty.at[order].set(out, unique_indices=True)
        return out.reshape(*chosen.shape, -1)

    @jax.named_scope("experts")
    def _applied(self, w, rows, expert, sizes):
        """`[R, D]` of rows sorted by expert; 0 past the last one's."""
        if self.reproducible:
            w = {name: x for name, x in w.items() if name in EXPERT_WEIGHTS}
            return experts_in_tiles(self._products, w, rows, sizes)
        return self._products(w, rows, expert, sizes)

    def _products(self, w, rows, expert, sizes):
        weights, layer = _where(w["down"])
        return grouped_matmul(self._activated(rows, w, expert, sizes), weights, sizes, layer=layer)

    def _activated(self, rows, w, expert, sizes):
        """`[R, F]`, rows sorted by expert."""
        if self.activation.is_silu and not self.use_bias:
            limit = self.activation.limit
            gate, layer = _where(w["gate"])
            up, _ = _where(w["up"])
            return grouped_swiglu(rows, gate, up, sizes, clamp=limit, layer=layer)

        def project(name):
            weights, layer = _where(w[name])
            y = grouped_matmul(rows, weights, sizes, layer=layer)
            return y + w[f"{name}_bias"].at[expert].get(mode="clip") if self.use_bias else y

        return self.activation(project("gate"), project("up"))

    def _choice(self, logits, scores, given, positions, w, axes):
        """Experts `[M, k]`, and what the router did."""
        k, bias = self.num_experts_per_tok, w.get("router_bias")
        if given is None:
            chosen = self.routing.select(scores, k, bias)
            unbiased = None if bias is None else self.routing.select(scores, k)
        else:
            chosen, unbiased = given.reshape(-1, k), None
        stats = router_stats(logits, chosen, unbiased, positions, self.routing, axes)
        if given is not None:
            stats = stats._replace(probabilities=lax.stop_gradient(stats.probabilities))
        return chosen, stats

    def _logits(self, x, w):
        """Float32 `[M, E]`."""
        logits = jnp.einsum(
            "md,de->me", x.astype(jnp.float32), w["router"], precision=lax.Precision.HIGHEST
        )
        if self.routing.linear_bias:
            logits = logits + w["router_linear_bias"]
        return logits


def _spec(placed):
    """The spec `[E, D, F]` of weights, quantized or not, in a stack or by themselves."""
    weights, layer = _where(placed)
    spec = weights.values if is_quantized(weights) else weights
    return spec if layer is None else P(*spec[1:])


def _where(weights):
    """`(weights, layer)` as `grouped_matmul` takes them: a stack, or a layer's own and None."""
    return (weights.stack, weights.layer) if isinstance(weights, InStack) else (weights, None)


def _number(weights) -> int:
    """Count the experts whose weights these are."""
    array, layer = _where(weights)
    shape = array.values.shape if is_quantized(array) else array.shape
    return shape[0 if layer is None else 1]


def _in_dtype(value, dtype, reproducible):
    """Weights as products take them: quantized, or in `dtype`.

    Those in a stack stay there where nothing has to be computed of them; tiles of one expert are
    cut out of a layer's own.
    """
    if isinstance(value, InStack):
        as_it_is = is_quantized(value.stack) or value.stack.dtype == dtype
        if as_it_is and not reproducible:
            return value
        value = value.copy()
    return value if is_quantized(value) else value.astype(dtype)


def _weighed(out, weights):
    return jnp.einsum("mkd,mk->md", out.astype(jnp.float32), weights)


def _at_once(compute, *arrays):
    return compute(*arrays)
