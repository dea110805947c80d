# SPDX-License-Identifier: Apache-2.0
"""Heads for sequence: every device gets all tokens of some heads, and attends alone.

Communication a device (letters as in `ring`): all-to-alls of q, out, k and v, `B t N H e`,
`B t N V e` and `B t max(K, n) (H + V) e` bytes about, of which 1/n stays: where KV heads are fewer
than devices, each is sent to those that hold its query heads and to no other. Positions (and
segment ids) are gathered, `4 n B t`. Backward: dout, the rows' float32 delta, dq, dk and dv the
other way; dk and dv in float32 where a KV head went to several devices, whose parts are summed.
An all-to-all needs its pieces side by side: XLA copies each operand or result once.

Memory, forward, beside the arguments: q, out, k and v of all tokens and 1/n of the heads, a copy
of one of them, and out: `B t (3 N H + K (H + V)) e`, whatever n. (On GPUs the kernel's table of
blocks, `4 (n t)^2 / (128 x 64)` bytes a few times, is more than that beyond a million tokens.)

Source: Jacobs et al., DeepSpeed Ulysses (arXiv 2309.14509).
"""

import dataclasses
import functools

import jax
from jax import lax

from jaxcp.context_parallel.cost import Cost, Shapes, Traffic
from jaxcp.context_parallel.exchange import Exchange, exchanged_shapes, gathered
from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels.flash_attention import attention_backward, attention_forward, named, row_delta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ulysses(Strategy):
    """Exchanges heads for tokens once: each of n devices attends with 1/n of the heads, everywhere.

    Every mask is honoured. KV heads that n does not divide are repeated. Source: DeepSpeed Ulysses
    (arXiv 2309.14509).

    Raises:
      ValueError: the number of heads is no multiple of n.
    """

    def attend(
        self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, mask, expand=None, weights=(), **options,
    ):  # fmt: skip
        if expand is not None:
            raise NotImplementedError(
                "Ulysses sends heads, which a latent has none of; use Ring() or AllGather()"
            )
        statics = axis_name, (q.shape[2], k.shape[2]), tuple({"mask": mask, **options}.items())
        return _attend(statics, q, k, v, q_pos, kv_pos, q_seg, kv_seg)

    def cost(self, shapes: Shapes) -> Cost:
        """Leaves out the lse, which travels back only where it is read: for sinks, or a merge."""
        n = shapes.shards
        inner = exchanged_shapes(shapes, n)
        repeated = n * inner.num_kv_heads > shapes.num_kv_heads
        gradients = inner.kv_numbers * (shapes.acc if repeated else shapes.itemsize)
        rows = shapes.q_bytes + shapes.out_bytes
        delta = shapes.rows * shapes.acc
        return Cost(
            forward=(
                Traffic("all-to-all", 4, rows + inner.kv_bytes, n),
                Traffic("all-gather", shapes.ids, n * shapes.query_ids_bytes, n),
            ),
            backward=(Traffic("all-to-all", 5, rows + delta + gradients, n),),
            held=2 * shapes.q_bytes + shapes.out_bytes + inner.kv_bytes,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(statics, *arrays):
    return _forward(statics, *arrays)[0]


def _exchange(axis_name, heads):
    return Exchange.over(axis_name, lax.axis_size(axis_name), *heads)


def _forward(statics, q, k, v, *ids):
    axis_name, heads, options = statics
    swap = _exchange(axis_name, heads)
    arrays = swap.queries(q), swap.keys(k), swap.keys(v), *(gathered(x, axis_name) for x in ids)
    out, lse = attention_forward(*arrays, **dict(options))
    out, lse = named(swap.back(out), lse)
    own_out, own_lse = out, swap.back(lse)
    return (own_out, own_lse), (arrays, lse, own_out)


def _backward(statics, saved, grads):
    arrays, lse, out = saved
    axis_name, heads, options = statics
    swap, (dout, dlse) = _exchange(axis_name, heads), grads
    delta = swap.queries(row_delta(out, dout, dlse))
    q, k, v, q_pos, kv_pos, q_seg, kv_seg = arrays
    ids = q_pos, kv_pos, q_seg, kv_seg
    rows = lse, swap.queries(dout), delta
    dq, dk, dv = attention_backward(q, k, v, *ids, *rows, **dict(options))
    dkeys = swap.keys_back(dk, k.dtype), swap.keys_back(dv, v.dtype)
    return swap.back(dq.astype(q.dtype)), *dkeys, None, None, None, None


_attend.defvjp(_forward, _backward)
