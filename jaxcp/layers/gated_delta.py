# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers by the gated delta rule: one decay a head, or one a channel (KDA).

Queries, keys and values pass a short convolution and silu; queries and keys get length one. In
which order tokens lie, over which devices, and what is kept is not known here: `attend` answers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcp.attention.cache import Room
from jaxcp.attention.recurrent import Recurrent
from jaxcp.layers.linear import linear
from jaxcp.layers.norm import GatedRMSNorm
from jaxcp.layers.parameter import constant, normal
from jaxcp.sharding import tokens_spec

LENGTH_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaDims:
    """Heads of keys and of values, their channels, and taps of the convolutions."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    taps: int = 4

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 1 or self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"sizes must be positive, num_key_heads must divide num_value_heads; got {self}"
            )


class DeltaLayer(nnx.Module):
    """The parts that both have; a subclass says what decays (`log_decay`) and gates (`gate`)."""

    def __init__(
        self,
        embed_dim: int,
        dims: DeltaDims,
        *,
        activation: str,
        norm_eps: float,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
    ):
        d, keys = dims, (embed_dim, dims.num_key_heads, dims.key_dim)
        values = embed_dim, d.num_value_heads, d.value_dim
        inputs = ("query", keys, KEYS), ("key", keys, KEYS), ("value", values, VALUES)
        for name, shape, axes in inputs:
            setattr(self, name, normal(rngs, shape, axes, std, summed=1))
            taps = normal(rngs, (d.taps, *shape[1:]), ("places", *axes[1:]), d.taps**-0.5)
            setattr(self, f"{name}_taps", taps)
        self.beta = normal(rngs, values[:2], VALUES[:2], std)
        self.norm = GatedRMSNorm(d.value_dim, eps=norm_eps, activation=activation)
        out = d.num_value_heads, d.value_dim, embed_dim
        self.out = normal(rngs, out, ("heads", "head_dim", "embed"), out_std, summed=2)
        self.dims = dims

    def empty(self, room: Room, *, layers: int = 1) -> Recurrent:
        """Make what so many layers like this one keep, before the first token."""
        d = self.dims
        keys, values = (d.num_key_heads, d.key_dim), (d.num_value_heads, d.value_dim)
        return Recurrent.empty(
            room, layers=layers, num_heads=d.num_value_heads, key_dim=d.key_dim,
            value_dim=d.value_dim, width=d.taps - 1, inputs=(keys, keys, values),
            decay=self.decay_shape,
        )  # fmt: skip

    @property
    def decay_shape(self) -> tuple[int, ...]:
        """The shape of a token's decays."""
        return (self.dims.num_value_heads,)

    @jax.named_scope("delta")
    def __call__(self, x, positions, attend):
        del positions  # order is all that counts
        names = "query", "key", "value"
        inputs = tuple(linear("btd,dnh->btnh", x, getattr(self, name)) for name in names)
        taps = tuple(getattr(self, f"{name}_taps").get_value() for name in names)
        q, k, v = (jax.nn.silu(y) for y in attend.convolved(inputs, taps))
        beta = jax.nn.sigmoid(linear("btd,dn->btn", x, self.beta))
        with jax.named_scope("attend"):
            out = attend.delta(_unit(q), _unit(k), v, self.log_decay(x), beta)
        out = self.norm(out, self.gate(x))
        with jax.named_scope("output"):
            return linear("btnh,nhd->btd", out, self.out, tokens_spec(x))

    def log_decay(self, x):
        """Float32 `[B, T, N]` or `[B, T, N, H]`, 0 or less."""
        raise NotImplementedError

    def gate(self, x):
        """`[B, T, N, V]`, before its activation."""
        raise NotImplementedError


class GatedDelta(DeltaLayer):
    """One decay a head: Qwen3-Next and Qwen3.5. Source: arXiv 2412.06464."""

    def __init__(self, embed_dim: int, dims: DeltaDims, *, std: float, rngs: nnx.Rngs, **options):
        super().__init__(embed_dim, dims, activation="silu", std=std, rngs=rngs, **options)
        values = embed_dim, dims.num_value_heads, dims.value_dim
        self.z = normal(rngs, values, VALUES, std, summed=1)
        self.decay = normal(rngs, values[:2], VALUES[:2], std)
        self.decay_bias = constant(values[1:2], VALUES[1:2], 1.0, keep_float32=True)
        self.log_rate = constant(values[1:2], VALUES[1:2], 0.0, keep_float32=True)

    def log_decay(self, x):
        return _log_decay(
            linear("btd,dn->btn", x, self.decay), self.decay_bias, self.log_rate.get_value()
        )

    def gate(self, x):
        return linear("btd,dnh->btnh", x, self.z)


class KimiDelta(DeltaLayer):
    """One decay a channel of the key, of a narrow middle: Kimi Linear. Source: arXiv 2510.26692."""

    def __init__(
        self, embed_dim: int, dims: DeltaDims, *, rank: int, std: float, rngs: nnx.Rngs, **options
    ):
        super().__init__(embed_dim, dims, activation="sigmoid", std=std, rngs=rngs, **options)
        heads = dims.num_value_heads
        for name, width in (("decay", dims.key_dim), ("z", dims.value_dim)):
            down = normal(rngs, (embed_dim, rank), ("embed", "latent"), std, summed=1)
            setattr(self, f"{name}_down", down)
            wide, axes = (rank, heads, width), ("latent", "heads", "head_dim")
            setattr(self, f"{name}_up", normal(rngs, wide, axes, rank**-0.5, summed=1))
        self.decay_bias = constant(
            (heads, dims.key_dim), ("heads", "head_dim"), 0.0, keep_float32=True
        )
        self.log_rate = constant((heads,), ("heads",), 0.0, keep_float32=True)

    @property
    def decay_shape(self) -> tuple[int, ...]:
        return self.dims.num_value_heads, self.dims.key_dim

    def log_decay(self, x):
        rate = self.log_rate.get_value()[:, None]
        return _log_decay(self._narrow(x, "decay"), self.decay_bias, rate)

    def gate(self, x):
        return self._narrow(x, "z")

    def _narrow(self, x, name):
        middle = linear("btd,dr->btr", x, getattr(self, f"{name}_down"))
        return linear("btr,rnh->btnh", middle, getattr(self, f"{name}_up"))


KEYS, VALUES = ("embed", "kv_heads", "head_dim"), ("embed", "heads", "head_dim")


def _log_decay(x, bias, log_rate):
    """`-exp(log_rate) * softplus(x + bias)`."""
    x = x.astype(jnp.float32) + bias.astype(jnp.float32)
    return -jnp.exp(log_rate.astype(jnp.float32)) * jax.nn.softplus(x)


def _unit(x):
    """Heads of length one, float32 inside."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt((y * y).sum(-1, keepdims=True) + LENGTH_EPS)).astype(x.dtype)
