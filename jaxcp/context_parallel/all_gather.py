# SPDX-License-Identifier: Apache-2.0
"""Gather all keys and values once, then attend locally.

Communication a device (letters as in `ring`): one all-gather each of K, V and positions, each in
c chunks, to `n B t (K (H + V) e + 4)` bytes; backward one reduce-scatter each of dK and dV, in
float32, of `4 n B t K (H + V)`. The backward pass keeps what was gathered. XLA on TPU makes of a
reduce-scatter a fused sum-and-cut, with two small permutes.

With chunks each gather but the first runs beside the kernel of the chunk before it: on GPUs (with
`compiler_options`) and tpu7x. On v5p and v6e XLA's all-gather is synchronous; use `Ring`.

Memory, forward, beside the arguments: all of K and V, and out: `n B t K (H + V) e + B t N V e`; in
chunks two of them and two float32 partial results: `(2 / c) n B t K (H + V) e + 8 B t N V + out`.

Source: Llama 3 (arXiv 2407.21783), section 3.3.2.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcp.context_parallel.circulate import as_before, flat, gradients, in_turn, met
from jaxcp.context_parallel.cost import Cost, Shapes, Traffic
from jaxcp.context_parallel.exchange import gathered, scattered
from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels.flash_attention import attention_forward, named, row_delta


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllGather(Strategy):
    """K/V gathered once; every mask is honoured.

    `chunks`: parts in which each shard's keys are gathered, so that one part is on its way while
    attention runs on the part before.
    """

    chunks: int = 1

    def __post_init__(self):
        if self.chunks < 1:
            raise ValueError(f"chunks must be at least 1; got {self.chunks}")

    def attend(
        self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, mask, expand=None, weights=(), **options,
    ):  # fmt: skip
        keys = (k, v) if expand is None else k
        statics = axis_name, self.chunks, tuple({"mask": mask, **options}.items()), expand
        return _attend(statics, q, keys, weights, q_pos, kv_pos, q_seg, kv_seg)

    def cost(self, shapes: Shapes) -> Cost:
        n, chunks = shapes.shards, min(self.chunks, shapes.keys)
        keys = n * shapes.kv_bytes
        arrays = keys + n * shapes.key_ids_bytes
        gradients = n * shapes.kv_numbers * shapes.acc
        gathered_keys = 2 * keys // chunks + 2 * shapes.partial_bytes if chunks > 1 else keys
        return Cost(
            forward=(Traffic("all-gather", chunks * (2 + shapes.ids), arrays, n),),
            backward=(Traffic("reduce-scatter", 2 * chunks, gradients, n),),
            held=gathered_keys + shapes.out_bytes,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(statics, *arrays):
    return _with_parts(statics, *arrays)[0]


def _with_parts(statics, q, keys, weights, q_pos, kv_pos, q_seg, kv_seg):
    """`(out, lse)`, and the gathered parts of keys, positions and segment ids."""
    axis_name, chunks, options, expand = statics
    acc = np.promote_types(q.dtype, np.float32)
    parts = _cut((flat(keys), kv_pos, kv_seg), chunks)

    def everywhere(part):
        return jax.tree.map(lambda x: gathered(x, axis_name), part)

    done: Any = None
    coming: Any = everywhere(parts[0])
    whole = []
    for i in range(len(parts)):
        here, last = coming, i == len(parts) - 1
        coming = None if last else everywhere(parts[i + 1])
        k, v = met(as_before(keys, here[0]), expand, weights)
        arrays = q, k, v, q_pos, here[1], q_seg, here[2]
        carry = None if done is None else (done[0].reshape(*q.shape[:3], -1), done[1])
        dtype = q.dtype if last else acc
        out, lse = attention_forward(*arrays, carry=carry, out_dtype=dtype, **dict(options))
        # one part arrives beside the kernel, not all of them before it
        done, coming, parts = in_turn(((flat(out), lse), coming, parts))
        whole.append(here)
    return (done[0].reshape(*q.shape[:3], -1), done[1]), whole


def _forward(statics, *arrays):
    done, whole = _with_parts(statics, *arrays)
    done = named(*done)
    q, keys, weights, q_pos, _, q_seg, _ = arrays
    return done, (q, keys, weights, q_pos, q_seg, whole, *done)


def _backward(statics, saved, grads):
    axis_name, _, options, expand = statics
    q, keys, weights, q_pos, q_seg, whole, out, lse = saved
    dout, dlse = grads
    queries = q, q_pos, q_seg, lse, dout, row_delta(out, dout, dlse)

    def home(tree):  # summed in float32, whatever the keys are
        return jax.tree.map(lambda x: scattered(x, axis_name), tree)

    sums: Any = None
    ready, dkeys = None, []
    for part in whole:
        if ready is not None:
            dkeys.append(home(ready))
        here = as_before(keys, part[0]), *part[1:]
        *more, ready = flat(gradients(options, expand, weights, queries, *here))
        sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
        sums, ready, queries = in_turn((sums, ready, queries))
    dkeys.append(home(ready))
    dkeys = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *dkeys)
    results = sums[0], dkeys, sums[1]
    like = q, keys, weights
    results = jax.tree.map(lambda x, like: x.reshape(like.shape).astype(like.dtype), results, like)
    return *results, None, None, None, None


_attend.defvjp(_forward, _backward)


def _cut(tree, chunks):
    """`tree` of `[B, t, ...]` in `chunks` parts along t, fewer where there are fewer tokens."""
    tokens = jax.tree.leaves(tree)[0].shape[1]
    ends = np.linspace(0, tokens, min(chunks, tokens) + 1).astype(int)
    return [jax.tree.map(lambda x, a=a, b=b: x[:, a:b], tree) for a, b in itertools.pairwise(ends)]
