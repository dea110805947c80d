# SPDX-License-Identifier: Apache-2.0
"""Keys and values that travel around circles of devices, and attention over what passes by.

The engine of every strategy that rotates K/V. A `Circle` is one direction of travel; with two,
half of the keys go each way, so that both directions of a full-duplex link carry them.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import target_platform
from pallas_kernels.flash_attention import attention_backward, attention_forward, named, row_delta


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
        """Make `stride` circles of the devices of `axis_name` that are `stride` apart."""
        n = lax.axis_size(axis_name)
        hops = [(i, (i + stride) % n) for i in range(n)]
        return cls(axis_name, n // stride, tuple((b, a) if reverse else (a, b) for a, b in hops))

    def rotate(self, tree):
        """Receive the tree of the neighbour before, and send ours on."""
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
    queries = flat(q)

    def attend(done, streams, out_dtype=acc):
        for i, (travels, pos, seg) in enumerate(streams):
            k, v = met(as_before(keys, travels), expand, weights)
            carry = None if done is None else (done[0].reshape(*q.shape[:3], -1), done[1])
            dtype = out_dtype if i == len(streams) - 1 else acc
            arrays = as_before(q, queries), k, v, q_pos, pos, q_seg, seg
            out, lse = attention_forward(*arrays, carry=carry, out_dtype=dtype, **dict(options))
            done = flat(out), lse
        return done

    def step(_, carry):
        done, streams = carry
        following = _rotate(circles, streams)
        return in_turn((attend(done, streams), following))

    done, streams = None, _split((flat(keys), kv_pos, kv_seg), len(circles))
    if n > 1:
        carry = step(0, (done, streams))
        done, streams = lax.fori_loop(0, n - 2, step, carry, unroll=_unroll())
    out, lse = attend(done, streams, q.dtype)
    return out.reshape(*q.shape[:3], -1), lse


def _forward(circles, options, expand, *arrays):
    out, lse = named(*_circulate(circles, options, expand, *arrays))
    return (out, lse), (*arrays, out, lse)


class _Sums(NamedTuple):
    """Sums and keys that device r carries from one step of the backward pass to the next.

    Of a circle of 4, whose keys it meets and whose gradient arrives meanwhile:

        step              1      2      3      4
        keys of device    r - 1  r - 2  r - 3  r       own keys wait at home
        dkeys of device   none   r - 2  r - 3  r       one step behind their keys, then home
    """

    here: Any
    """`(dq, dweights)` over all keys met so far, in float32."""
    streams: Any
    """The keys to meet of each circle, their positions and segment ids."""
    dkeys: Any
    """The gradient of the keys met last of each circle, in float32."""


def _backward(circles, options, expand, saved, grads):
    q, keys, weights, q_pos, kv_pos, q_seg, kv_seg, out, lse = saved
    # else XLA keeps what the forward pass received first until now, and saves a rotation
    grads, out, lse, travels = in_turn((grads, out, lse, (flat(keys), kv_pos, kv_seg)))
    dout, dlse = grads
    n = circles[0].size
    delta = row_delta(out, dout, dlse)
    rows = flat((q, dout))

    def gradient(travels, pos, seg):
        q_rows, dout_rows = as_before((q, dout), rows)
        queries = q_rows, q_pos, q_seg, lse, dout_rows, delta
        met_keys = as_before(keys, travels)
        return flat(gradients(options, expand, weights, queries, met_keys, pos, seg))

    def meet(sums, onward=True):  # keys and the gradient that belongs to them move on together
        following = _rotate(circles, sums.streams) if onward else None
        dkeys = None if sums.dkeys is None else _rotate(circles, sums.dkeys)
        parts = [gradient(*stream) for stream in sums.streams]
        here = functools.reduce(_added, [part[:2] for part in parts])
        dkeys = _added(dkeys, [part[2] for part in parts])
        return _Sums(_added(sums.here, here), following, dkeys)

    own = _split(travels, len(circles))
    sums = _Sums(None, own, None)
    if n > 1:
        sums = sums._replace(streams=_rotate(circles, own))
        sums = in_turn(meet(sums, onward=n > 2))
        if n > 2:
            turns = n - 3, lambda _, sums: in_turn(meet(sums))
            sums = meet(lax.fori_loop(0, *turns, sums, unroll=_unroll()), onward=False)
        sums, own = in_turn((sums, own))
    # own keys last: they hide the gradient's way home, twice the bytes of what hides nowhere
    sums = meet(sums._replace(streams=own), onward=False)
    dq, dweights = sums.here
    dkeys = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *sums.dkeys)
    results, like = (dq, dkeys, dweights), (q, keys, weights)
    results = jax.tree.map(lambda x, like: x.reshape(like.shape).astype(like.dtype), results, like)
    return *results, None, None, None, None


_circulate.defvjp(_forward, _backward)


def gradients(options, expand, weights, queries, keys, pos, seg):
    """`(dq, dweights, dkeys)`: what some keys add to each, in float32.

    `queries`: q, its positions and segment ids, lse, dout and delta.
    """
    q, q_pos, q_seg, *rest = queries
    k, v = met(keys, expand, weights)
    dq, *dkeys = attention_backward(q, k, v, q_pos, pos, q_seg, seg, *rest, **dict(options))
    if expand is None:
        return dq, (), tuple(dkeys)
    _, pull = jax.vjp(expand, keys, *weights)
    pulled = pull(tuple(d.astype(x.dtype) for d, x in zip(dkeys, (k, v), strict=True)))
    dkeys, *dweights = jax.tree.map(lambda x: x.astype(dq.dtype), pulled)
    return dq, tuple(dweights), dkeys


def met(keys, expand, weights):
    return keys if expand is None else expand(keys, *weights)


def _added(total, part):
    return part if total is None else jax.tree.map(jnp.add, total, part)


def _rotate(circles, streams):
    return [circle.rotate(x) for circle, x in zip(circles, streams, strict=True)]


def in_turn(tree):
    """`tree`, none of it used before all of it is there.

    A transfer that could start at any time XLA starts at once: of a loop that is written out it
    holds every shard, and in one that is not it copies what the next transfer would overwrite.
    """
    return lax.optimization_barrier(tree)


def _unroll() -> int:
    """Turns of a loop written out at a time.

    A loop keeps what it carries in one place, and what arrives cannot lie where what is attended
    to lies: with two turns the two places change roles, with one XLA copies K, V and out.
    On CPU a copy is nothing beside a step, and half of the program compiles in half the time.
    """
    return 1 if target_platform() == "cpu" else 2


def flat(tree):
    """`[B, S, ...]` as `[B, S, everything]`: how TPU kernels take heads, so nothing is re-laid."""
    return jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1), tree)


def as_before(tree, flattened):
    """`flattened` with the inner dimensions of `tree`."""
    return jax.tree.map(lambda x, y: y.reshape(*y.shape[:2], *x.shape[2:]), tree, flattened)


def _split(tree, count):
    """`tree` of `[B, S, ...]` in `count` parts along S."""
    size = jax.tree.leaves(tree)[0].shape[1]
    ends = [size * i // count for i in range(count + 1)]
    return [jax.tree.map(lambda x, a=a, b=b: x[:, a:b], tree) for a, b in itertools.pairwise(ends)]
