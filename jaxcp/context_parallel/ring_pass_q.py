# SPDX-License-Identifier: Apache-2.0
"""Queries travel and keys stay: for few new tokens against a long sharded cache.

Communication a device, with t new tokens and n shards (letters as in `ring`): all-gather of q and
positions, to `n B t (N H e + 4)` bytes; one all-to-all of partial results and their lse in float32,
`4 n B t N (V + 1)`. Keys and values: none. Backward: all-gathers of dout, lse and delta, to
`n B t N (V e + 8)`, and one reduce-scatter of dq in float32, `4 n B t N H`.

Memory, forward, beside the arguments: the partial results of all queries as they leave and as they
arrive, and out: `8 n B t N (V + 1) + B t N V e`. They are packed for one all-to-all: one copy.

`fewer_bytes` is the rule: K/V of s slots a shard that go round a ring cost
`(n - 1) s (K (H + V) e + 4)`, the above `(n - 1) t (N (H e + 4 (V + 1)) + 4)` a row. With e = 2
and H = V that is pass-Q where `t / s < 2 K / (3 N)` about; Meta's `t / (t + p) < 2 K / N` is for
partial results in 16 bits that a kernel hides. (arXiv 2411.01783)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcp.context_parallel.circulate import gradients, met
from jaxcp.context_parallel.cost import Cost, Shapes, Traffic, circle_cost
from jaxcp.context_parallel.exchange import gathered, scattered
from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels.flash_attention import attention_forward, named, row_delta
from pallas_kernels.online_softmax import merge_stacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingPassQ(Strategy):
    """Rotates queries and gathers their results; every device attends to the keys it holds.

    For few queries beside many keys: a short turn on a long cache. Every mask is honoured. Sends
    `n - 1` times the queries and, in float32, their results; holds no keys but its own.
    """

    def attend(
        self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, mask, expand=None, weights=(), **options,
    ):  # fmt: skip
        statics = axis_name, tuple({"mask": mask, **options}.items()), expand
        keys = (k, v) if expand is None else k
        return _attend(statics, q, keys, weights, q_pos, kv_pos, q_seg, kv_seg)

    @staticmethod
    def fewer_bytes(q, k, v) -> bool:
        """Tell whether local shards of these shapes send less by passing q than rotating K/V."""
        shapes = Shapes(
            shards=2,  # of n the bytes of both are n - 1 times these
            batch=q.shape[0],
            tokens=q.shape[1],
            keys=k.shape[1],
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            head_dim=q.shape[3],
            value_dim=v.shape[3],
            itemsize=q.dtype.itemsize,
        )
        return RingPassQ().cost(shapes).sent < circle_cost(shapes).sent

    def cost(self, shapes: Shapes) -> Cost:
        n, rows, acc = shapes.shards, shapes.rows, shapes.acc
        partial = n * rows * (shapes.value_dim + 1) * acc
        queries = n * (shapes.q_bytes + shapes.query_ids_bytes)
        gradients = n * (shapes.out_bytes + 2 * rows * acc)  # dout, lse and delta
        return Cost(
            forward=(
                Traffic("all-gather", 1 + shapes.ids, queries, n),
                Traffic("all-to-all", 1, partial, n),
            ),
            backward=(
                Traffic("all-gather", 3, gradients, n),
                Traffic("reduce-scatter", 1, n * rows * shapes.head_dim * acc, n),
            ),
            held=2 * partial + shapes.out_bytes,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(statics, *arrays):
    return _forward(statics, *arrays)[0]


def _forward(statics, q, keys, weights, q_pos, kv_pos, q_seg, kv_seg):
    axis_name, options, expand = statics
    acc = np.promote_types(q.dtype, np.float32)
    every = tuple(gathered(x, axis_name) for x in (q, q_pos, q_seg))
    arrays = every[0], *met(keys, expand, weights), every[1], kv_pos, every[2], kv_seg
    out, lse = attention_forward(*arrays, out_dtype=acc, **dict(options))
    packed = jnp.concatenate([out, lse[..., None].astype(acc)], axis=-1)
    packed = lax.all_to_all(packed, axis_name, 1, 0, tiled=True)  # [n * B, t, N, V + 1]
    packed = packed.reshape(-1, q.shape[0], *packed.shape[1:])
    out, lse = merge_stacked(packed[..., :-1], packed[..., -1])
    results = named(out.astype(q.dtype), lse)
    return results, (every, keys, weights, kv_pos, kv_seg, *results)


def _backward(statics, saved, grads):
    axis_name, options, expand = statics
    every, keys, weights, kv_pos, kv_seg, out, lse = saved
    dout, dlse = grads
    rows = (gathered(x, axis_name) for x in (lse, dout, row_delta(out, dout, dlse)))
    queries = *every, *rows
    dq, dweights, dkeys = gradients(options, expand, weights, queries, keys, kv_pos, kv_seg)
    results = scattered(dq, axis_name), dkeys, dweights
    results = jax.tree.map(lambda x, like: x.astype(like.dtype), results, (dout, keys, weights))
    return *results, None, None, None, None


_attend.defvjp(_forward, _backward)
