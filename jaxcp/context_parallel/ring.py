# SPDX-License-Identifier: Apache-2.0
"""Ring attention: keys and values travel, each device merges what passes by.

Communication a device, forward: n-1 rotations of its K and V (and positions: 4 bytes a token).
Backward: n-1 rotations of K and V, and n-1 of dK and dV in float32, which travel with them: a
shard's gradient starts at its first foreign host, one step behind K/V, and needs one hop home.
Memory: two K/V shards, whatever n.

Source: Liu et al., Ring Attention (arXiv 2310.01889).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels.flash_attention import attention_backward, attention_forward, row_delta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring(Strategy):
    """K/V rotate n-1 times; every mask is honoured."""

    def attend(self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, axis_name, mask, **options):
        static = tuple({"mask": mask, **options}.items())
        return _ring(axis_name, static, q, k, v, q_pos, kv_pos, q_seg, kv_seg)


def _rotate(tree, axis_name):
    n = lax.axis_size(axis_name)
    hops = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, hops), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(axis_name, options, q, k, v, q_pos, kv_pos, q_seg, kv_seg):
    n = lax.axis_size(axis_name)
    acc = np.promote_types(q.dtype, np.float32)

    def attend(done, kv, out_dtype=acc):
        k, v, pos, seg = kv
        arrays = q, k, v, q_pos, pos, q_seg, seg
        return attention_forward(*arrays, carry=done, out_dtype=out_dtype, **dict(options))

    def step(_, carry):
        done, kv = carry
        # issued before the kernel, and independent of it: they overlap
        following = _rotate(kv, axis_name)
        return attend(done, kv), following

    kv = k, v, kv_pos, kv_seg
    if n == 1:
        return attend(None, kv, q.dtype)
    rows = q.shape[:3]
    done = jnp.zeros((*rows, v.shape[3]), acc), jnp.full(rows, -jnp.inf, acc)
    # a fori_loop: XLA would hoist the permutes of a Python loop and hold every shard at once;
    # and the first rotation is in it: outside, XLA keeps its result for the backward pass
    done, kv = lax.fori_loop(0, n - 1, step, (done, kv))
    return attend(done, kv, q.dtype)


def _ring_fwd(axis_name, options, q, k, v, q_pos, kv_pos, q_seg, kv_seg):
    out, lse = _ring(axis_name, options, q, k, v, q_pos, kv_pos, q_seg, kv_seg)
    return (out, lse), (q, k, v, q_pos, kv_pos, q_seg, kv_seg, out, lse)


def _ring_bwd(axis_name, options, saved, grads):
    q, k, v, q_pos, kv_pos, q_seg, kv_seg, out, lse = saved
    dout, dlse = grads
    n = lax.axis_size(axis_name)
    delta = row_delta(out, dout, dlse)

    def partial(kv):
        k, v, pos, seg = kv
        dq, dk, dv = attention_backward(
            q, k, v, q_pos, pos, q_seg, seg, lse, dout, delta, **dict(options)
        )
        return dq, (dk, dv)

    def add(a, b):
        return jax.tree.map(jnp.add, a, b)

    def step(_, carry):  # K/V and the gradient that belongs to them move on together
        dq, kv, travelling = carry
        following, arrived = _rotate(kv, axis_name), _rotate(travelling, axis_name)
        more_dq, more = partial(kv)
        return dq + more_dq, following, add(arrived, more)

    kv = (k, v, kv_pos, kv_seg)
    foreign = _rotate(kv, axis_name) if n > 1 else None
    dq, home = partial(kv)
    if n == 2:
        more_dq, travelling = partial(foreign)
        dq, home = dq + more_dq, add(home, _rotate(travelling, axis_name))
    elif n > 2:
        following = _rotate(foreign, axis_name)
        more_dq, travelling = partial(foreign)
        dq, kv, travelling = lax.fori_loop(0, n - 3, step, (dq + more_dq, following, travelling))
        arrived = _rotate(travelling, axis_name)
        more_dq, more = partial(kv)
        dq, home = dq + more_dq, add(home, _rotate(add(arrived, more), axis_name))
    dk, dv = home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None, None


_ring.defvjp(_ring_fwd, _ring_bwd)
