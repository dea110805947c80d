# SPDX-License-Identifier: Apache-2.0
"""The same bits from 1, 2, 4 and 8 shards: fixed blocks, combined in a fixed order.

The sequence is cut into 16 pieces whatever the number of shards. Every pair of pieces is computed
by one program of one shape, partial results stay in float32, and each sum runs over pieces in
natural order: over keys for `out` and dQ, over queries for dK and dV.

What it costs: K and V (of a latent, the latent) are gathered, and in the backward pass q, dout, lse
and delta as well, to the memory of `AllGather`; dQ and dK/dV each compute the scores again; grouped
heads are repeated on the device (not on the wire), and a latent is expanded anew for every pair.
Pairs with nothing to see are skipped, which changes no bit. `FixedOrder.cost` counts it all.

The gradient of a latent's weights is a sum over all tokens: a part for each piece, in float32,
gathered and added in natural order. Where devices hold copies (of weights, of a latent whose heads
are sharded) JAX adds their gradients up in an order of its own; so the sum is made here, and one
device brings it, the others zeros.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcp.context_parallel.cost import Cost, Shapes, Traffic
from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels import PAD_POSITION
from pallas_kernels.flash_attention import (
    NO_POSITION,
    attention_backward,
    attention_forward,
    named,
    row_delta,
)
from pallas_kernels.flash_attention.mask import bounds
from pallas_kernels.online_softmax import merge

PIECES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedOrder(Strategy):
    """Adds everything up in one order: the same bits, forward and backward, from 1 to 16 shards.

    Of 1, 2, 4, 8 or 16 shards (of `Zigzag()` to 8); every mask is honoured. For finding out
    whether a change of mesh changed a result: it gathers as `AllGather` does, and is slower. Of
    latents (`latent_attention`) only while the `data` and `model` axes stay as they are.

    Raises:
      ValueError (at the call): shards or tokens that 16 pieces of consecutive tokens do not fit.
      NotImplementedError (at the call): a latent, and no word about copies of it: only
        `latent_attention` knows them.
    """

    fills_caches: ClassVar[bool] = False
    same_bits: ClassVar[bool] = True

    def attend(
        self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, mask, expand=None, weights=(), copies=None, **options,
    ):  # fmt: skip
        """Attend as `Strategy.attend` says.

        `copies`: with `expand`, the mesh axes (beside `axis_name`) whose devices hold the same
        latent, and those that hold the same of each weight: `(axes, (axes, ...))`.
        """
        shards = lax.axis_size(axis_name)
        where = axis_name, pieces_of(self.layout, shards, q.shape[1], kv_pos.shape[1])
        if expand is not None and copies is None:
            raise NotImplementedError(
                "FixedOrder needs to know which devices hold copies of a latent; call "
                "jaxcp.latent_attention, which does, in place of strategy.attend"
            )
        if q_seg is None:
            q_seg, kv_seg = jnp.zeros_like(q_pos), jnp.zeros_like(kv_pos)
        static = tuple({"mask": mask, **options}.items())
        keys = (k, v) if expand is None else k
        making = expand, copies
        return _attend(where, static, making, q, keys, weights, q_pos, kv_pos, q_seg, kv_seg)

    def cost(self, shapes: Shapes) -> Cost:
        n = shapes.shards
        pieces_of(self.layout, n, shapes.tokens, shapes.keys)
        keys = n * (shapes.kv_bytes + shapes.key_ids_bytes)
        ordering = n * shapes.kv_bytes // 2  # K, and then V, once more as they arrived
        # of a pair of pieces: q, K/V and K/V of every query head, and two partial results
        each = 2 * shapes.q_bytes + shapes.out_bytes + shapes.kv_bytes + 2 * shapes.partial_bytes
        pair = n * each // PIECES
        queries = shapes.q_bytes + shapes.out_bytes + 2 * shapes.rows * shapes.acc
        return Cost(
            forward=(Traffic("all-gather", 2 + shapes.ids, keys, n),),
            backward=(Traffic("all-gather", 4, n * queries, n),),  # q, dout, lse and delta
            held=shapes.out_bytes + n * shapes.kv_bytes + max(ordering, pair),
        )


def pieces_of(layout, shards, tokens, keys):
    """`[shards][pieces of a shard]`: number of each piece, in natural order."""
    total = shards * tokens
    whole = tokens == keys and PIECES % shards == 0 and total % PIECES == 0
    rows = np.zeros((0, 0), int)
    if whole and total == layout.padded_length(total, shards):
        rows = layout.order(total, shards).reshape(PIECES, -1)
    if not rows.size or (rows[:, -1] - rows[:, 0] != rows.shape[1] - 1).any():
        raise ValueError(
            f"FixedOrder needs 1, 2, 4, 8 or 16 shards, a multiple of {PIECES} tokens "
            f"and Zigzag() (to 8 shards) or Contiguous(); got {shards} shards of {tokens} tokens, "
            f"{layout}"
        )
    numbers = rows[:, 0] // rows.shape[1]
    return tuple(map(tuple, numbers.reshape(shards, -1).tolist()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(where, options, making, q, keys, weights, q_pos, kv_pos, q_seg, kv_seg):
    everyone = _all(where, _own(where, (keys, kv_pos, kv_seg)))
    expand = _expander(making, weights, q.shape[2])
    acc = np.promote_types(q.dtype, np.float32)
    width = jax.eval_shape(expand, keys)[1].shape[3]

    def row(own):
        q, pos, seg = own
        start = jnp.zeros((*q.shape[:3], width), acc), jnp.full(q.shape[:3], -jnp.inf, acc)

        def more(done, other):
            keys, kv_pos, kv_seg = other

            def part():
                arrays = q, *expand(keys), pos, kv_pos, seg, kv_seg
                return merge(done, attention_forward(*arrays, out_dtype=acc, **dict(options)))

            return lax.cond(_visible(options, pos, kv_pos), part, lambda: done), None

        out, lse = lax.scan(more, start, everyone)[0]
        return out.astype(q.dtype), lse

    return _joined(lax.map(row, _own(where, (q, q_pos, q_seg))))


def _forward(where, options, making, *arrays):
    out, lse = named(*_attend(where, options, making, *arrays))
    return (out, lse), (*arrays, out, lse)


def _backward(where, options, making, saved, grads):
    q, keys, weights, q_pos, kv_pos, q_seg, kv_seg, out, lse = saved
    dout, dlse = grads
    expand = _expander(making, weights, q.shape[2])
    # in pieces too: another shape would be another order of additions
    delta = _joined(lax.map(lambda x: row_delta(*x), _own(where, (out, dout, dlse))))
    queries = q, q_pos, q_seg, lse, dout, delta
    own_queries, own_keys = _own(where, queries), _own(where, (keys, kv_pos, kv_seg))
    all_queries, all_keys = _all(where, own_queries), _all(where, own_keys)

    def summed(which, total, query, k, v, kv_pos, kv_seg):
        """`total` and what a pair of pieces adds to it: `which` of its `(dq, dk, dv)`."""
        q, q_pos, q_seg, lse, dout, delta = query

        def part():
            arrays = q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, dout, delta
            results = attention_backward(*arrays, **dict(options))
            return jax.tree.map(jnp.add, total, results[which])

        return lax.cond(_visible(options, q_pos, kv_pos), part, lambda: total)

    def over_keys(query):
        def more(total, other):
            keys, kv_pos, kv_seg = other
            k, v = expand(keys)
            return summed(slice(0, 1), total, query, k, v, kv_pos, kv_seg), None

        start = (jnp.zeros(query[0].shape, lse.dtype),)
        return lax.scan(more, start, all_keys)[0][0]

    def over_queries(key):
        keys, kv_pos, kv_seg = key
        k, v = expand(keys)

        def more(total, query):
            return summed(slice(1, 3), total, query, k, v, kv_pos, kv_seg), None

        start = tuple(jnp.zeros(x.shape, lse.dtype) for x in (k, v))
        return _pulled(making, keys, weights, *lax.scan(more, start, all_queries)[0])

    dq = _joined(lax.map(over_keys, own_queries))
    dkeys, dweights = lax.map(over_queries, own_keys)
    results = dq, *_added(where, making, _joined(dkeys), dweights)
    results = jax.tree.map(lambda x, like: x.astype(like.dtype), results, (q, keys, weights))
    return *results, None, None, None, None


_attend.defvjp(_forward, _backward)


def _expander(making, weights, heads):
    """The function from what was gathered to k and v, one KV head for each query head, so that
    gradients add up outside of the kernel."""
    expand, _ = making

    def full(keys):
        k, v = keys if expand is None else expand(keys, *weights)
        return tuple(jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))

    return full


def _pulled(making, keys, weights, dk, dv):
    """`(dkeys, dweights)` of a piece, not rounded further, from those of k and v for each head."""
    expand, _ = making
    k, v = keys if expand is None else jax.eval_shape(expand, keys, *weights)
    dk, dv = (
        x.reshape(*x.shape[:2], like.shape[2], -1, x.shape[3]).sum(3)
        for x, like in ((dk, k), (dv, v))
    )
    if expand is None:
        return (dk, dv), ()
    _, pull = jax.vjp(expand, keys, *weights)
    dkeys, *dweights = pull((dk.astype(k.dtype), dv.astype(v.dtype)))
    return jax.tree.map(lambda x: x.astype(dk.dtype), (dkeys, tuple(dweights)))


def _added(where, making, dkeys, dweights):
    """Gradients as JAX's sum over devices that hold copies leaves them: see the module."""
    expand, copies = making
    if expand is None:
        return dkeys, dweights
    axis_name, _ = where
    of_latent, of_weights = copies
    dkeys = jax.tree.map(lambda x: _once(_over(x, of_latent), of_latent), dkeys)
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    each = [
        _once(_over(_in_order(_all(where, x)), more), (*axes, *more))
        for x, more in zip(dweights, of_weights, strict=True)
    ]
    return dkeys, tuple(each)


def _over(x, axes):
    """The sum over the devices of `axes`, in their order."""
    return _in_order(lax.all_gather(x, axes)) if axes else x


def _in_order(x):
    return functools.reduce(jnp.add, list(x))


def _once(x, axes):
    """`x` on the first device of `axes`, zeros on the others: any sum over them is x, bit for bit
    (but for the sign of a zero, which is made plus)."""
    if not axes:
        return x
    return jnp.where((lax.axis_index(axes) == 0) & (x != 0), x, jnp.zeros_like(x))


def _own(where, tree):
    """Local `[B, t, ...]` as `[pieces, B, P, ...]`."""
    _, numbers = where
    count = len(numbers[0])
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0), tree
    )


def _joined(tree):
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), tree)


def _all(where, own):
    """Gather the local `[pieces, ...]`: every piece, `[16, ...]`, in natural order."""
    axis_name, numbers = where
    order = np.argsort(np.reshape(numbers, -1))
    return jax.tree.map(
        lambda x: jnp.take(lax.all_gather(x, axis_name, tiled=True), order, axis=0), own
    )


def _visible(options, q_pos, kv_pos):
    """Tell whether any query of one piece may see any key of another."""
    q_pos = jnp.where(q_pos == PAD_POSITION, NO_POSITION, q_pos)
    q, kv = bounds(q_pos, pad=NO_POSITION), bounds(kv_pos, pad=PAD_POSITION)
    return dict(options)["mask"].may_see(*q, *kv).any()
