# SPDX-License-Identifier: Apache-2.0
"""Keys and values that travel around circles of devices, and attention over what passes by.

The engine of every strategy that rotates K/V. A `Circle` is one direction of travel; with two,
half of the keys go each way, so that both directions of a full-duplex link carry them.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash_attention import attention_backward, attention_forward, row_delta


@dataclasses.dataclass(frozen=True)
class Circle:
    """`size` devices that pass on along `hops`, pairs of indices on `axis_name`.

    Several circles of one size may lie side by side on the axis; then `hops` holds them all.
    """

    axis_name: Any
    size: int
    hops: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, axis_name, *, stride: int = 1, reverse: bool = False) -> "Circle":
        """Over the devices of `axis_name` that are `stride` apart, `stride` circles in all."""
        n = lax.axis_size(axis_name)
        hops = [(i, (i + stride) % n) for i in range(n)]
        return cls(axis_name, n // stride, tuple((b, a) if reverse else (a, b) for a, b in hops))

    def rotate(self, tree):
        """What the neighbour before held."""
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, self.hops), tree)


def circulate(circles, options, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, expand=None, weights=()):
    """`(out, lse)` of local queries over the keys of their circle. Inside shard_map.

    Each of one or two circles carries an equal share of every shard's keys. `options`: pairs for
    `attention_forward`. Forward: n - 1 rotations of K/V; backward: n - 1 of K/V and n - 1 of dK
    and dV in float32, which follow one step behind and need one hop home.

    With `expand`, `k` is a tree of `[B, S, ...]` that travels in place of keys and values (v is
    None), and `expand(k, *weights)` makes `(k, v)` of it wherever it is met.
    """
    keys = (k, v) if expand is None else k
    return _circulate(circles, options, expand, q, keys, weights, q_pos, kv_pos, q_seg, kv_seg)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _circulate(circles, options, expand, q, keys, weights, q_pos, kv_pos, q_seg, kv_seg):
    n = circles[0].size
    acc = np.promote_types(q.dtype, np.float32)

    def attend(done, streams, out_dtype=acc):
        for i, (keys, pos, seg) in enumerate(streams):
            k, v = keys if expand is None else expand(keys, *weights)
            dtype = out_dtype if i == len(streams) - 1 else acc
            arrays = q, k, v, q_pos, pos, q_seg, seg
            done = attention_forward(*arrays, carry=done, out_dtype=dtype, **dict(options))
        return done

    def step(_, carry):
        done, streams = carry
        # issued before the kernel, and independent of it: they overlap
        following = _rotate(circles, streams)
        return attend(done, streams), following

    streams = _split((keys, kv_pos, kv_seg), len(circles))
    if n == 1:
        return attend(None, streams, q.dtype)
    _, v = keys if expand is None else jax.eval_shape(expand, keys, *weights)
    rows = q.shape[:3]
    done = jnp.zeros((*rows, v.shape[3]), acc), jnp.full(rows, -jnp.inf, acc)
    # a fori_loop: XLA would hoist the permutes of a Python loop and hold every shard at once;
    # and the first rotation is in it: outside, XLA keeps its result for the backward pass
    done, streams = lax.fori_loop(0, n - 1, step, (done, streams))
    return attend(done, streams, q.dtype)


def _forward(circles, options, expand, *arrays):
    out, lse = _circulate(circles, options, expand, *arrays)
    return (out, lse), (*arrays, out, lse)


def _backward(circles, options, expand, saved, grads):
    q, keys, weights, q_pos, kv_pos, q_seg, kv_seg, out, lse = saved
    dout, dlse = grads
    n = circles[0].size
    delta = row_delta(out, dout, dlse)

    def gradient(keys, pos, seg):
        """`(dq, dweights, dkeys)`, what these keys add to each, in float32."""
        k, v = keys if expand is None else expand(keys, *weights)
        arrays = q, k, v, q_pos, pos, q_seg, seg, lse, dout, delta
        dq, dk, dv = attention_backward(*arrays, **dict(options))
        if expand is None:
            return dq, (), (dk, dv)
        _, pull = jax.vjp(expand, keys, *weights)
        dkeys, *dweights = jax.tree.map(
            lambda x: x.astype(dq.dtype), pull((dk.astype(k.dtype), dv.astype(v.dtype)))
        )
        return dq, tuple(dweights), dkeys

    def partial(streams):  # sums of what stays here, and what goes on with each stream
        parts = [gradient(*stream) for stream in streams]
        return functools.reduce(add, [part[:2] for part in parts]), [part[2] for part in parts]

    def add(a, b):
        return jax.tree.map(jnp.add, a, b)

    def step(_, carry):  # K/V and the gradient that belongs to them move on together
        mine, streams, travelling = carry
        following, arrived = _rotate(circles, streams), _rotate(circles, travelling)
        more_mine, more = partial(streams)
        return add(mine, more_mine), following, add(arrived, more)

    streams = _split((keys, kv_pos, kv_seg), len(circles))
    foreign = _rotate(circles, streams) if n > 1 else None
    mine, home = partial(streams)
    if n == 2:
        more_mine, travelling = partial(foreign)
        mine, home = add(mine, more_mine), add(home, _rotate(circles, travelling))
    elif n > 2:
        following = _rotate(circles, foreign)
        more_mine, travelling = partial(foreign)
        carry = add(mine, more_mine), following, travelling
        mine, streams, travelling = lax.fori_loop(0, n - 3, step, carry)
        arrived = _rotate(circles, travelling)
        more_mine, more = partial(streams)
        mine, home = add(mine, more_mine), add(home, _rotate(circles, add(arrived, more)))
    dkeys = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *home)
    found = mine[0], dkeys, mine[1]
    found = jax.tree.map(lambda x, like: x.astype(like.dtype), found, (q, keys, weights))
    return *found, None, None, None, None


_circulate.defvjp(_forward, _backward)


def _rotate(circles, streams):
    return [circle.rotate(x) for circle, x in zip(circles, streams, strict=True)]


def _split(tree, count):
    """`tree` of `[B, S, ...]` in `count` parts along S."""
    size = jax.tree.leaves(tree)[0].shape[1]
    ends = [size * i // count for i in range(count + 1)]
    return [jax.tree.map(lambda x, a=a, b=b: x[:, a:b], tree) for a, b in itertools.pairwise(ends)]
