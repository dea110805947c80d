# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4's attention: a window of tokens, and blocks of tokens compressed to one entry each.

One head of keys serves all query heads and is the values too. It carries rotary positions, so the
output is turned back by the query's position. Layers differ in the entries that they add to the
window: none; one for every block (long blocks); or, of short overlapping blocks, those that an
index selects for each query.

Source: the report of DeepSeek-V4.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcp.attention.blocks import block_starts
from jaxcp.attention.cache import Room
from jaxcp.attention.compressed import Compressed
from jaxcp.attention.selected import Selection
from jaxcp.layers.linear import linear
from jaxcp.layers.mla import IndexDims
from jaxcp.layers.norm import RMSNorm
from jaxcp.layers.parameter import constant, normal
from jaxcp.layers.rope import Rope, rotate
from jaxcp.sharding import tokens_spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedHeadDims:
    """Widths of DeepSeek-V4's attention; the last `rope_dim` of `head_dim` channels turn."""

    num_heads: int
    head_dim: int
    rope_dim: int
    q_rank: int
    out_rank: int
    out_groups: int

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 1 or self.rope_dim % 2:
            raise ValueError(f"widths must be positive and rope_dim even; got {self}")
        if self.rope_dim > self.head_dim or self.num_heads % self.out_groups:
            raise ValueError(
                "needs rope_dim <= head_dim, and out_groups that divide num_heads; "
                f"got {self.rope_dim} of {self.head_dim}, {self.out_groups} of {self.num_heads}"
            )


class CompressedAttention(nnx.Module):
    """Attention to a window and to compressed blocks of `ratio` tokens; 0: to the window alone.

    Blocks overlap where there is an `index` to select them.
    """

    def __init__(
        self,
        embed_dim: int,
        dims: SharedHeadDims,
        *,
        window: int,
        ratio: int,
        index: IndexDims | None,
        rope: Rope,
        norm_eps: float,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
    ):
        d = dims
        norm = functools.partial(RMSNorm, eps=norm_eps, float32_scale=True)
        self.q_down = normal(rngs, (embed_dim, d.q_rank), ("embed", "latent"), std, summed=1)
        self.q_norm = norm(d.q_rank, axis="latent")
        q_up = d.q_rank, d.num_heads, d.head_dim
        q_up_axes = "latent", "heads", "head_dim"
        self.q_up = normal(rngs, q_up, q_up_axes, d.q_rank**-0.5, summed=1)
        self.kv = normal(rngs, (embed_dim, d.head_dim), ("embed", "head_dim"), std, summed=1)
        self.kv_norm = norm(d.head_dim, axis="head_dim")
        self.sinks = constant((d.num_heads,), ("heads",), 0.0, keep_float32=True)
        # A group lies on one device with all its heads. A product for each group: not quantized.
        o_down = d.out_groups, d.num_heads // d.out_groups, d.head_dim, d.out_rank
        o_std = (d.num_heads // d.out_groups * d.head_dim) ** -0.5
        o_down_axes = "head_groups", "group_heads", "head_dim", "latent"
        self.o_down = normal(rngs, o_down, o_down_axes, o_std)
        o_up = d.out_groups, d.out_rank, embed_dim
        self.o_up = normal(rngs, o_up, ("head_groups", "latent", "embed"), out_std, summed=2)
        blocks = rope, d.rope_dim, norm_eps, std, rngs
        self.compressor = (
            Compressor(embed_dim, d.head_dim, ratio, index is not None, *blocks) if ratio else None
        )
        self.index = (
            None if index is None else BlockIndex(embed_dim, d.q_rank, index, ratio, *blocks)
        )
        self.dims, self.window, self.ratio = dims, window, ratio
        self.rope, self.norm_eps = rope, norm_eps

    def empty(self, room: Room, *, layers: int = 1) -> Compressed:
        """Make what so many layers like this one keep, before the first token."""
        sizes = {} if self.compressor is None else {"kv": self.dims.head_dim}
        if self.index is not None:
            sizes["index"] = self.index.index.head_dim
        return Compressed.empty(
            room, layers=layers, window=self.window, head_dim=self.dims.head_dim,
            ratio=self.ratio, overlap=self.index is not None, sizes=sizes,
        )  # fmt: skip

    @jax.named_scope("attention")
    def __call__(self, x, positions, attend):
        q, q_latent, kv = self._qkv(x, positions)
        options = {"window": self.window, "scale": self.dims.head_dim**-0.5}
        options["sinks"] = self.sinks.astype(jnp.float32)
        if self.compressor is None:
            with jax.named_scope("attend"):
                out = attend.shared(q, kv, **options)
        else:
            entries, blocks = self.compressor(x, positions, attend, name="kv")
            if self.index is not None:
                options["selection"] = self.index(x, q_latent, positions, attend)
            with jax.named_scope("attend"):
                out = attend.compressed(q, kv, entries, blocks, ratio=self.ratio, **options)
        return self._output(out, positions)

    @jax.named_scope("qkv")
    def _qkv(self, x, positions):
        """Queries, their latent, and the one head of keys, which are values too."""
        rope_dim = self.dims.rope_dim
        q_latent = self.q_norm(linear("btd,dr->btr", x, self.q_down))
        q = linear("btr,rnh->btnh", q_latent, self.q_up)
        q = rotate_last(unit_rms(q, self.norm_eps), positions, self.rope, rope_dim)
        kv = self.kv_norm(linear("btd,dh->bth", x, self.kv))
        kv = rotate_last(kv[:, :, None], positions, self.rope, rope_dim)[:, :, 0]
        return q, q_latent, kv

    @jax.named_scope("output")
    def _output(self, out, positions):
        """Project heads to the residual stream, group by group through a narrow middle."""
        out = rotate_last(out, positions, self.rope, self.dims.rope_dim, sign=-1)
        b, t, n, h = out.shape
        groups = self.dims.out_groups
        out = out.reshape(b, t, groups, n // groups, h)
        narrow = jnp.einsum("btgnh,gnhr->btgr", out, self.o_down.astype(out.dtype))
        return linear("btgr,grd->btd", narrow, self.o_up, tokens_spec(out))


class Compressor(nnx.Module):
    """Projects every token, and sums the projections of a block, with weights, to its entry.

    Computes in float32: a softmax over long blocks tells tokens apart by small differences.
    """

    def __init__(self, embed_dim, size, ratio, overlap, rope: Rope, rope_dim, norm_eps, std, rngs):
        width = size * (2 if overlap else 1)
        self.value = normal(rngs, (embed_dim, width), ("embed", "latent"), std)
        self.gate = normal(rngs, (embed_dim, width), ("embed", "latent"), std)
        self.bias = constant((ratio, width), ("places", "latent"), 0.0, keep_float32=True)
        self.norm = RMSNorm(size, eps=norm_eps, axis="latent", float32_scale=True)
        self.ratio, self.overlap = ratio, overlap
        self.rope, self.rope_dim = rope, rope_dim

    @jax.named_scope("compress")
    def __call__(self, x, positions, attend, *, name):
        """Compute entries in x's dtype, turned by the first position of their block; and blocks."""
        exact = x.astype(jnp.float32)
        values = jnp.einsum("btd,dc->btc", exact, self.value.astype(jnp.float32))
        gates = jnp.einsum("btd,dc->btc", exact, self.gate.astype(jnp.float32))
        gates = gates + _rows(self.bias.astype(jnp.float32), positions % self.ratio)
        entries, blocks = attend.compress(
            values, gates, ratio=self.ratio, overlap=self.overlap, name=name
        )
        begin = block_starts(blocks, self.ratio)
        entries = self.norm(entries).astype(x.dtype)[:, :, None]
        return rotate_last(entries, begin, self.rope, self.rope_dim)[:, :, 0], blocks


class BlockIndex(nnx.Module):
    """The lightning indexer over blocks: keys from a compressor of its own."""

    def __init__(
        self, embed_dim, q_rank, index: IndexDims, ratio, rope: Rope, rope_dim, norm_eps, std, rngs
    ):
        n, c = index.num_heads, index.head_dim
        q = q_rank, n, c
        self.q = normal(rngs, q, ("latent", "index_heads", "head_dim"), q_rank**-0.5, summed=1)
        self.weights = normal(rngs, (embed_dim, n), ("embed", "index_heads"), std)
        self.compressor = Compressor(embed_dim, c, ratio, True, rope, rope_dim, norm_eps, std, rngs)
        self.index, self.rope, self.rope_dim = index, rope, rope_dim

    @jax.named_scope("index")
    def __call__(self, x, q_latent, positions, attend) -> Selection:
        q = linear("btr,rnc->btnc", q_latent, self.q)
        q = rotate_last(q, positions, self.rope, self.rope_dim)
        keys, _ = self.compressor(x, positions, attend, name="index")
        weights = jnp.einsum("btd,dn->btn", x.astype(jnp.float32), self.weights.astype(jnp.float32))
        scale = (self.index.num_heads * self.index.head_dim) ** -0.5
        return Selection(queries=q, weights=weights * scale, keys=keys, top_k=self.index.top_k)


def rotate_last(x, positions, rope: Rope, rope_dim: int, *, sign: int = 1):
    """Turn the last `rope_dim` channels of `x [B, T, N, H]`, in float32."""
    still, turning = x[..., :-rope_dim], x[..., -rope_dim:].astype(jnp.float32)
    turned = rotate(turning, positions, rope, sign=sign).astype(x.dtype)
    return jnp.concatenate([still, turned], axis=-1)


def unit_rms(x, eps: float):
    """Divide x by its root mean square along the last axis; no weight."""
    y = x.astype(jnp.float32)
    return (y * jnp.reciprocal(jnp.sqrt(jnp.mean(y * y, -1, keepdims=True) + eps))).astype(x.dtype)


def _rows(table, index):
    """Take `table[index]`, laid out as `index [B, T]` is."""
    spec = tokens_spec(index)
    return table.at[index].get(
        mode="clip", out_sharding=None if spec is None else type(spec)(*spec, None)
    )
