# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: keys and values of all heads are made of one narrow latent.

Only the latent and one rotated key part that all heads share travel between devices, or stay in a
cache. With an index, a query sees the tokens that score best and no others; then heads meet
the latent itself (projections absorbed), so that what is selected need not be expanded.

Sources: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3.2 (arXiv 2512.02556).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcp.attention.cache import Room
from jaxcp.attention.latent import Latent
from jaxcp.attention.selected import Selection
from jaxcp.layers.linear import linear
from jaxcp.layers.norm import LayerNorm, RMSNorm
from jaxcp.layers.parameter import normal
from jaxcp.layers.rope import Rope, rotate
from jaxcp.sharding import tokens_spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentDims:
    """Widths: of the two latents, and of a head's key (plain and rotated part) and value.

    `q_rank` is None where queries are made of the stream itself.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def __post_init__(self):
        widths = (x for x in dataclasses.astuple(self) if x is not None)
        if min(widths) < 1 or self.rope_dim % 2:
            raise ValueError(f"widths must be positive and rope_dim even; got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexDims:
    """Heads and width of an index, and how many keys a query keeps."""

    num_heads: int
    head_dim: int
    top_k: int

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 1:
            raise ValueError(f"an index needs positive numbers; got {self}")


class LatentAttention(nnx.Module):
    """`rope`: None leaves the part of keys that all heads share as it is."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dims: LatentDims,
        *,
        rope: Rope | None,
        scale: float,
        index: IndexDims | None = None,
        norm_eps: float,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
    ):
        d, n = dims, num_heads
        width = d.nope_dim + d.rope_dim
        if d.q_rank is None:
            axes = "embed", "heads", "head_dim"
            self.q = normal(rngs, (embed_dim, n, width), axes, std, summed=1)
        else:
            self.q_down = normal(rngs, (embed_dim, d.q_rank), ("embed", "latent"), std, summed=1)
            self.q_norm = RMSNorm(d.q_rank, eps=norm_eps, axis="latent")
            q_up, q_up_axes = (d.q_rank, n, width), ("latent", "heads", "head_dim")
            self.q_up = normal(rngs, q_up, q_up_axes, d.q_rank**-0.5, summed=1)
        kv_down = embed_dim, d.kv_rank + d.rope_dim
        self.kv_down = normal(rngs, kv_down, ("embed", "latent"), std, summed=1)
        self.kv_norm = RMSNorm(d.kv_rank, eps=norm_eps, axis="latent")
        kv_up = d.kv_rank, n, d.nope_dim + d.value_dim
        # queries are absorbed into it, so it is no plain product: never quantized
        self.kv_up = normal(rngs, kv_up, ("latent", "heads", "head_dim"), d.kv_rank**-0.5)
        o = n, d.value_dim, embed_dim
        self.o = normal(rngs, o, ("heads", "head_dim", "embed"), out_std, summed=2)
        self.dims, self.rope, self.scale = dims, rope, scale
        self.index = (
            None
            if index is None or rope is None or d.q_rank is None
            else TokenIndex(embed_dim, d.q_rank, index, rope, d.rope_dim, std, rngs)
        )
        if index is not None and self.index is None:
            raise ValueError("an index needs rotary positions and a latent of queries")

    def empty(self, room: Room, *, layers: int = 1) -> Latent:
        """Make what so many layers like this one keep, before the first token."""
        size = self.dims.kv_rank + self.dims.rope_dim
        index_size = 0 if self.index is None else self.index.index.head_dim
        return Latent.empty(room, layers=layers, size=size, index_size=index_size)

    @jax.named_scope("attention")
    def __call__(self, x, positions, attend):
        q, q_latent, latent, key_part = self._qkv(x, positions)
        kv_up = self.kv_up.astype(x.dtype)
        up = kv_up[..., : self.dims.nope_dim], kv_up[..., self.dims.nope_dim :]
        selection = None if self.index is None else self.index(x, q_latent, positions)
        with jax.named_scope("attend"):
            if selection is None:
                out = attend.latent(q, (latent, key_part), up, expand=expanded, scale=self.scale)
            else:
                out = self._selected(q, latent, key_part, up, selection, attend)
        with jax.named_scope("output"):
            return linear("btnv,nvd->btd", out, self.o, tokens_spec(x))

    @jax.named_scope("qkv")
    def _qkv(self, x, positions):
        """Queries, their latent, that of keys and values, and the rotated part of keys."""
        d, q_latent = self.dims, None
        if d.q_rank is None:
            q = linear("btd,dnh->btnh", x, self.q)
        else:
            q_latent = self.q_norm(linear("btd,dr->btr", x, self.q_down))
            q = linear("btr,rnh->btnh", q_latent, self.q_up)
        kv = linear("btd,dr->btr", x, self.kv_down)
        latent, key_part = self.kv_norm(kv[..., : d.kv_rank]), kv[..., d.kv_rank :]
        if self.rope is not None:
            rotated = rotate(q[..., d.nope_dim :], positions, self.rope)
            q = jnp.concatenate([q[..., : d.nope_dim], rotated], axis=-1)
            key_part = rotate(key_part[:, :, None], positions, self.rope)[:, :, 0]
        return q, q_latent, latent, key_part

    def _selected(self, q, latent, key_part, up, selection, attend):
        d, (k_up, v_up) = self.dims, up
        absorbed = jnp.einsum("btnh,lnh->btnl", q[..., : d.nope_dim], k_up)
        q = jnp.concatenate([absorbed, q[..., d.nope_dim :]], axis=-1)
        keys = jnp.concatenate([latent, key_part], axis=-1)
        out = attend.selected(q, keys, selection, value_dim=d.kv_rank, scale=self.scale)
        return jnp.einsum("btnl,lnv->btnv", out, v_up)


def expanded(latent, k_up, v_up):
    """`expand` of `latent_attention`: keys and values of all heads."""
    compressed, key_part = latent
    k = jnp.einsum("btl,lnh->btnh", compressed, k_up)
    key_part = jnp.broadcast_to(key_part[:, :, None], (*k.shape[:3], key_part.shape[-1]))
    return jnp.concatenate([k, key_part], axis=-1), jnp.einsum("btl,lnv->btnv", compressed, v_up)


class TokenIndex(nnx.Module):
    """The lightning indexer of DeepSeek-V3.2: one key a token, many small queries.

    Its rotary positions are half-split and on the first channels, unlike those of the attention.
    """

    def __init__(self, embed_dim, q_rank, index: IndexDims, rope: Rope, rope_dim, std, rngs):
        n, c = index.num_heads, index.head_dim
        q = q_rank, n, c
        self.q = normal(rngs, q, ("latent", "index_heads", "head_dim"), q_rank**-0.5, summed=1)
        self.k = normal(rngs, (embed_dim, c), ("embed", "head_dim"), std, summed=1)
        self.k_norm = LayerNorm(c, eps=1e-6)
        self.weights = normal(
            rngs, (embed_dim, n), ("embed", "index_heads"), std, keep_float32=True
        )
        self.index, self.rope_dim = index, rope_dim
        self.rope = dataclasses.replace(rope, interleaved=False)

    @jax.named_scope("index")
    def __call__(self, x, q_latent, positions) -> Selection:
        q = self._rotated(linear("btr,rnc->btnc", q_latent, self.q), positions)
        k = self.k_norm(linear("btd,dc->btc", x, self.k))
        k = self._rotated(k[:, :, None], positions)[:, :, 0]
        weights = jnp.einsum("btd,dn->btn", x.astype(jnp.float32), self.weights.astype(jnp.float32))
        scale = (self.index.num_heads * self.index.head_dim) ** -0.5
        return Selection(queries=q, weights=weights * scale, keys=k, top_k=self.index.top_k)

    def _rotated(self, x, positions):
        first, rest = x[..., : self.rope_dim], x[..., self.rope_dim :]
        return jnp.concatenate([rotate(first, positions, self.rope), rest], axis=-1)
