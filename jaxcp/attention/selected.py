# SPDX-License-Identifier: Apache-2.0
"""Attention over a window and over one head of gathered keys, all of them or the best few a query.

A key brings its own value (its first channels), as the latent of multi-head latent attention does
and DeepSeek-V4's shared head. Positions alone mask: a compressed entry has that of the last token
in it. The window's part and the gathered part are merged by `(out, lse)`.

Communication a device: the window as the strategy or `Halo` sends it; one all-gather of the keys,
of the index keys and of their positions. Backward: one reduce-scatter of the keys' gradient; the
index is not differentiable. Memory: every key and index key on every device; a selection adds, for
as many queries at a time as fit `ELEMENTS`, their scores for every key and their selected keys.

Sources: DeepSeek-V3.2 (arXiv 2512.02556), the report of DeepSeek-V4.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxcp.attention.blocks import in_order
from jaxcp.context_parallel.api import qkv_spec
from jaxcp.context_parallel.halo import Halo
from jaxcp.context_parallel.ring import Ring
from jaxcp.context_parallel.shards import on_shards
from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels import PAD_POSITION, flash_attention
from pallas_kernels.flash_attention import Mask, apply_sinks
from pallas_kernels.online_softmax import merge

ELEMENTS = 2**24
"""Numbers in the largest array that a selection makes, in float32: 64 MiB."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["queries", "weights", "keys"],
    meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True)
class Selection:
    """A query sees the `top_k` keys of greatest `sum_h weights_h * relu(queries_h . keys)`.

    Of equal scores (zeros are common) the key that comes first is taken, as `jax.lax.top_k` does.
    """

    queries: Float[Array, "B T I C"]
    weights: Float[Array, "B T I"]
    keys: Float[Array, "B E C"]
    top_k: int


def sparse_attention(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B E H"],
    positions: Int[Array, "B T"],
    key_positions: Int[Array, "B E"],
    *,
    scale: float,
    value_dim: int | None = None,
    selection: Selection | None = None,
    limit: int | None = None,
    window_keys: Float[Array, "B T H"] | None = None,
    window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    strategy: Strategy | None = None,
    consecutive: bool = False,
    axis_name: str = "seq",
) -> Float[Array, "B T N V"]:
    """Attention of local queries over `keys`, and over `window_keys` within `window`.

    Arrays are global, in the strategy's layout, as `context_parallel_attention` takes them; keys
    have their own number E, sharded as tokens are, and `PAD_POSITION` where there is none.

    Args:
      value_dim: channels of a key that are its value; default all.
      selection: None sees every key that is not after the query.
      limit: how many keys there are at most, where E has room for more.
    Raises:
      NotImplementedError: a window without `consecutive`, under a strategy that sends heads.
    """
    strategy = Ring() if strategy is None else strategy
    if window is not None and consecutive:
        strategy = Halo(layout=strategy.layout, checked=False)
    alone = jax.sharding.get_abstract_mesh().empty
    local = functools.partial(
        _local,
        scale=scale,
        value_dim=q.shape[-1] if value_dim is None else value_dim,
        limit=keys.shape[1] if limit is None else limit,
        window=window,
        strategy=strategy,
        axis_name=None if alone else axis_name,
    )
    heads = P() if alone else qkv_spec(q, q, axis_name)
    run = on_shards(local, (heads, *[P(*heads[:2])] * 5), (heads, P(*heads[:3])))
    out, lse = run(q, keys, positions, key_positions, selection, window_keys)
    return out if sinks is None else apply_sinks(out, lse, sinks)[0]


def shared_head(kv):
    """`expand` of `latent_attention` for one head that is key and value."""
    return kv[:, :, None], kv[:, :, None]


def _local(q, keys, positions, key_positions, selection, window_keys, *,
           scale, value_dim, limit, window, strategy, axis_name):  # fmt: skip
    done = None
    if window_keys is not None:
        done = _windowed(q, window_keys, positions, window, strategy, scale, axis_name)
    if limit == 0:
        return done
    if selection is None:
        if axis_name is not None:
            keys, key_positions = lax.all_gather(
                (keys, key_positions), axis_name, axis=1, tiled=True
            )
        return flash_attention(
            q, keys[:, :, None], keys[:, :, None, :value_dim], q_positions=positions,
            kv_positions=key_positions, scale=scale, carry=done,
        )  # fmt: skip
    there = keys, lax.stop_gradient(selection.keys)
    (keys, index_keys), key_positions = in_order(there, key_positions, limit, axis_name)
    queries, weights = lax.stop_gradient((selection.queries, selection.weights))
    selected = attend_selected(
        q, keys, queries, weights, index_keys, positions, key_positions,
        top_k=selection.top_k, scale=scale, value_dim=value_dim,
    )  # fmt: skip
    if done is None:
        out, lse = selected
    else:
        out, lse = merge((done[0].astype(jnp.float32), done[1]), selected)
    return out.astype(q.dtype), lse


def _windowed(q, kv, positions, window, strategy, scale, axis_name):
    """`(out, lse)` over the window, out in float32."""
    if axis_name is None:
        k, v = shared_head(kv)
        return flash_attention(
            q, k, v, q_positions=positions, kv_positions=positions, window=window, scale=scale,
        )  # fmt: skip
    options = {"soft_cap": None, "scale": scale, "implementation": None}
    return strategy.attend(
        q, kv, None, positions, positions, None, None, axis_name=axis_name,
        mask=Mask(window=window), expand=shared_head, **options,
    )  # fmt: skip


def attend_selected(
    q, keys, queries, weights, index_keys, positions, key_positions, *, top_k, scale, value_dim,
    axis_name: str | None = None, block: int | None = None,
):  # fmt: skip
    """`(out float32, lse)` of local queries over the `top_k` best keys; `block` at a time.

    `keys [B, S, H]`, or a function that gives those at some indices `[B, T, k]` as `[B, T, k, H]`.

    With `axis_name` every shard has the same queries and keys of its own, of which it attends to
    those that are among the best of all shards: the results are yet to be merged.
    """
    b, t, n, h = q.shape
    if block is None:
        most = min(top_k, index_keys.shape[1])
        widest = max(index_keys.shape[1], most * h, n * most)
        block = max(1, ELEMENTS // (b * widest))
    attend = functools.partial(
        _attend_block, keys=keys, index_keys=index_keys, key_positions=key_positions,
        top_k=top_k, scale=scale, value_dim=value_dim, axis_name=axis_name,
    )  # fmt: skip
    # the position of a pad is that of an empty key: -1 sees nothing
    rows = q, queries, weights, jnp.where(positions == PAD_POSITION, -1, positions)
    if block >= t:
        return attend(rows)

    def blocks(x):
        x = jnp.pad(x, [(0, 0), (0, -t % block)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, -1, block, *x.shape[2:]), 1, 0)

    def back(x):
        return jnp.moveaxis(x, 0, 1).reshape(b, -1, *x.shape[3:])[:, :t]

    attended = lax.map(jax.checkpoint(attend), jax.tree.map(blocks, rows))
    return jax.tree.map(back, attended)


def _attend_block(
    rows, *, keys, index_keys, key_positions, top_k, scale, value_dim, axis_name
):  # fmt: skip
    q, queries, weights, positions = rows
    chosen, visible = select(
        queries, weights, index_keys, positions, key_positions, top_k, axis_name
    )
    there = keys(chosen) if callable(keys) else jax.vmap(lambda x, rows: x[rows])(keys, chosen)
    logits = jnp.einsum("btnh,btkh->btnk", q, there, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(visible[:, :, None], logits, -jnp.inf)
    high = lax.stop_gradient(logits).max(-1, keepdims=True)
    high = jnp.where(jnp.isneginf(high), 0.0, high)
    p = jnp.exp(logits - high)
    total = p.sum(-1)
    nothing = total == 0
    safe = jnp.where(nothing, 1.0, total)
    out = jnp.einsum("btnk,btkv->btnv", p, there[..., :value_dim].astype(jnp.float32))
    return out / safe[..., None], jnp.where(nothing, -jnp.inf, high[..., 0] + jnp.log(safe))


def select(
    queries, weights, index_keys, positions, key_positions, top_k: int, axis_name: str | None = None
):
    """Rows of the `top_k` best keys `[B, T, k]`, k at most as many as there are, and which of them
    are visible.

    Scores are float32. Keys come in the order in which equal scores are to be taken. With
    `axis_name` those of a shard count as visible that are among the `top_k` of all shards.
    """
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    index_keys = index_keys.astype(jnp.float32)

    def add(scores, head):  # head by head: all at once would be `num_heads` times the memory
        q, weight = head
        one = jax.nn.relu(exact("btc,bsc->bts", q, index_keys))
        return scores + one * weight[..., None], None

    heads = (jnp.moveaxis(x, 2, 0).astype(jnp.float32) for x in (queries, weights))
    nothing = jnp.zeros((*queries.shape[:2], index_keys.shape[1]), jnp.float32)
    scores, _ = lax.scan(add, nothing, tuple(heads))
    scores = jnp.where(scores == 0, 0.0, scores)  # -0 is less than 0 to a sort, and no less here
    scores = jnp.where(key_positions[:, None] <= positions[..., None], scores, -jnp.inf)
    best, chosen = lax.top_k(scores, min(top_k, scores.shape[-1]))
    visible = best > -jnp.inf
    if axis_name is not None:
        at = jnp.take_along_axis(key_positions[:, None], chosen, axis=2)
        visible &= _among_best(best, at, top_k, axis_name)
    return chosen, visible


def _among_best(scores, positions, top_k: int, axis_name: str):
    """Tell which `scores [B, T, k]` of this shard are among the `top_k` best of all shards; of
    equal ones those come first that have the smaller of `positions`, all of which differ."""
    rank = -scores, positions
    everyone = lax.all_gather(rank, axis_name, axis=2, tiled=True)
    score, position = (
        x[..., :top_k][..., -1:] for x in lax.sort(everyone, dimension=2, num_keys=2)
    )
    return (rank[0] < score) | ((rank[0] == score) & (positions <= position))
