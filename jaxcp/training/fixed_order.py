# SPDX-License-Identifier: Apache-2.0
"""Gradients with the same bits on 1, 2, 4 and 8 `seq` shards: sums over 16 pieces, in one order.

A weight meets all tokens, so its gradient is a sum over tokens, which JAX makes on each device
first: another mesh is another order. Here each of the 16 pieces that `FixedOrder` cuts a sequence
into has a copy of the weights, and products of one shape on any mesh; the gradients of the copies
are added in the order of the pieces, and so are losses. Models are not written for it: `in_turn`
runs one piece after the other, and attention alone, which looks across them, is given all of them.

What it costs: 16 gradients of the model lie on each device while they are added.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxcp.attention.attend import Attend
from jaxcp.context_parallel.api import context_parallel_attention
from jaxcp.context_parallel.fixed_order import PIECES, pieces_of
from jaxcp.layers.attention import Attention
from jaxcp.layers.cross_entropy import walk
from jaxcp.models import abstract_model
from jaxcp.training.in_turn import across, in_turn
from jaxcp.training.objective import Totals

OPTIONS = {"xla_allow_excess_precision": False}
"""XLA's, of a step: else it leaves out roundings to bfloat16, other ones for one device than for
several."""


@functools.lru_cache(maxsize=8)
def is_covered(model_config: Any) -> bool:
    """Tell whether the gradients of a model can be summed so: one of dense layers that attend by
    heads, without sinks."""
    model = abstract_model(model_config)
    kinds = [attention for attention, _ in model.attentions().values()]
    plain = all(isinstance(x, Attention) and not x.has_sinks for x in kinds)
    absent = ("num_experts", "num_mtp_layers")
    narrow = getattr(model_config, "ngram_width", 1) == 1
    return plain and narrow and not any(getattr(model_config, name, 0) for name in absent)


def fits(strategy: Any, model_config: Any, mesh: Any) -> bool:
    """Tell whether a step on this mesh is one that has the same bits on others.

    Args:
      mesh: sizes of the axes.
    """
    if strategy is None or not strategy.same_bits or mesh.get("seq", 0) < 1:
        return False
    others = [size for axis, size in mesh.items() if axis != "seq"]
    return set(others) <= {1} and is_covered(model_config)


def gradient(
    join: Callable, params: Any, piece: Any, strategy: Any, chunk: int
) -> tuple[Any, Totals]:
    """Sum the gradient of the loss of next tokens, and the `Totals`, over a batch `[B, T]`.

    Args:
      join: makes the model of parameters.
    """
    shards = jax.sharding.get_abstract_mesh().shape["seq"]
    here = piece["tokens"].shape[1] // shards
    order = np.argsort(np.ravel(pieces_of(strategy.layout, shards, here, here))).tolist()
    attend = InPieces(piece["positions"], piece.get("segment_ids"), strategy)

    def one(params, part):
        model = join(params)
        x, _ = model.forward(part["tokens"], part["positions"], attend)
        losses = walk(x, model.head_kernel(), part["targets"], chunk=chunk)
        return jnp.sum(part["weights"].reshape(-1) * losses), jnp.sum(part["weights"])

    def total(copies):
        sums = in_turn(one, copies, jax.tree.map(split, piece))
        return sums[0].sum(), sums

    def copied(x):
        return jax.lax.broadcast(x, (PIECES,), out_sharding=P("seq", *[None] * x.ndim))

    grads, sums = jax.grad(total, has_aux=True)(jax.tree.map(copied, params))
    loss, weight = (in_order(x, order) for x in sums)
    grads = jax.tree.map(lambda x: in_order(x, order), grads)
    return grads, Totals(weight, {"loss": loss}, None)


def in_order(x: jax.Array, order: list[int]) -> jax.Array:
    """Add up the rows of `x [16, ...]`, in this order."""
    rows = jax.sharding.reshard(x, P())
    return functools.reduce(jnp.add, [rows[i] for i in order])


def split(x: jax.Array) -> jax.Array:
    """Cut `[B, T, ...]` into `[16, B, T / 16, ...]`, pieces over `seq`."""
    rows, tokens, *rest = x.shape
    shape = rows, PIECES, tokens // PIECES, *rest
    spec = P(None, "seq", *[None] * (len(shape) - 2))
    x = jax.sharding.reshard(x, P(None, "seq"))
    return jnp.moveaxis(jax.lax.reshape(x, shape, out_sharding=spec), 1, 0)


def joined(x: jax.Array) -> jax.Array:
    """Put the pieces `[16, B, P, ...]` together again, `[B, T, ...]`."""
    x = jnp.moveaxis(jax.sharding.reshard(x, P("seq")), 0, 1)
    shape = x.shape[0], PIECES * x.shape[2], *x.shape[3:]
    spec = P(None, "seq", *[None] * (len(shape) - 2))
    return jax.lax.reshape(x, shape, out_sharding=spec)


class InPieces(Attend):
    """Attention for a model that `in_turn` runs on pieces: it is given one, and looks at all.

    Args:
      positions, segment_ids: of all tokens, `[B, T]`.
    """

    def __init__(self, positions: Any, segment_ids: Any, strategy: Any):
        none = jnp.zeros_like(positions)
        self.ids = positions, none if segment_ids is None else segment_ids
        self.strategy = strategy

    def __call__(self, q, k, v, *, window, sinks=None, scale=None, soft_cap=None):
        assert sinks is None  # `is_covered`

        def whole(q, k, v):
            positions, segments = self.ids
            q, k, v = (joined(x) for x in (q, k, v))
            out = context_parallel_attention(
                q, k, v, positions, segment_ids=segments,
                strategy=self.strategy, window=window, scale=scale, soft_cap=soft_cap,
            )  # fmt: skip
            return split(out)

        return across(whole, q, k, v)
