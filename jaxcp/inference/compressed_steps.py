# SPDX-License-Identifier: Apache-2.0
"""`prefill` and `decode_step` over a `CompressedCache`, which every device holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxcp.attention.compressed import CompressedStep
from jaxcp.context_parallel import Ring
from jaxcp.context_parallel.overlap import compiler_options
from jaxcp.inference.turns import WIDTHS, Frame, latest, pieces
from pallas_kernels.dispatch import target_platform

EXTEND_SIZES = (1, 8, 32, 64)
"""Widths to which short turns are padded; longer turns are sharded."""


def prefill_compressed(model, cache, tokens, lengths, strategy):
    """`jaxcp.prefill` of checked tokens int `[B, T]` and lengths int32 `[B]`, on the host."""
    start, done = np.asarray(cache.lengths), np.zeros_like(lengths)
    strategy, logits = Ring() if strategy is None else strategy, None
    for piece in pieces_of(start, lengths, strategy):
        arrays = *piece.laid_out(tokens, done, start), piece.taken.astype(np.int32)
        done = done + piece.taken
        if not jax.sharding.get_abstract_mesh().empty:
            arrays = jax.device_put(arrays, (*[tokens_spec(piece.sharded)] * 2, P("data")))
        found, cache = _jitted(True)(model, cache, *arrays, piece.sharded, strategy)
        logits = latest(logits, found, piece.taken)
    return logits, cache


def pieces_of(start, lengths, strategy):
    """The pieces of a turn, over the mesh in scope. A cache takes any: nothing has to be level."""
    frame = Frame(shards=jax.sharding.get_abstract_mesh().shape.get("seq", 1))
    return pieces(frame, start, lengths, strategy.layout, EXTEND_SIZES, least=WIDTHS[0])


def tokens_spec(sharded: bool) -> P:
    return P("data", "seq" if sharded else None)


def _step(model, cache, tokens, positions, added, sharded, strategy):
    attend = CompressedStep(cache, positions, added, sharded=sharded, strategy=strategy)
    hidden, _ = model.forward(tokens, positions, attend)
    here = (positions == (cache.lengths + added - 1)[:, None]).astype(hidden.dtype)
    sharding = None if jax.sharding.get_abstract_mesh().empty else P("data", None)
    last = jnp.einsum("bt,btd->bd", here, hidden, out_sharding=sharding)
    return model.logits(last[:, None])[:, 0], attend.after()


def _jitted(donate: bool):
    return _jit(donate, target_platform())


@functools.cache
def _jit(donate: bool, platform: str):
    return jax.jit(
        _step,
        static_argnums=(5, 6),
        donate_argnums=(1,) if donate else (),
        compiler_options=compiler_options(platform),
    )
