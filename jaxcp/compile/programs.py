# SPDX-License-Identifier: Apache-2.0
"""Makes the programs that an `Engine` runs, with shapes instead of arrays, for `compile_for`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcp.attention.slots import MAX_EXTEND
from jaxcp.context_parallel import Strategy
from jaxcp.inference import steps, turns
from jaxcp.sharding import DEFAULT, Rules
from jaxcp.weights.placement import parts_of


def prefill_program(
    model: Any,
    mesh: Mesh,
    *,
    tokens: int,
    held: int = 0,
    max_len: int | None = None,
    batch_size: int = 1,
    strategy: Strategy | None = None,
    rules: Rules = DEFAULT,
) -> tuple[Callable, tuple]:
    """The program of `jaxcp.prefill` for `[batch_size, tokens]` and a cache of `held` tokens.

    If the turn has several pieces (see `jaxcp.inference.turns`): that of the first and largest.

    Args:
      model: `jaxcp.abstract_model(config)`.
      held: tokens in the cache. With any, `tokens` must be over 64: fewer run another program.
      max_len: tokens that the cache is made for; default `held + tokens`.
      rules: which axes of parameters lie where, as in `jaxcp.load`.

    >>> fn, args = prefill_program(jaxcp.abstract_model(config), mesh, tokens=131_072)
    >>> print(compile_for(fn, args, mesh))
    """
    if held and tokens <= MAX_EXTEND:
        raise ValueError(f"needs over {MAX_EXTEND} tokens where some are held; got {tokens}")
    cache = _cache(model, mesh, batch_size, held + tokens if max_len is None else max_len)
    start, lengths = np.full(batch_size, held), np.full(batch_size, tokens)
    layout = turns.layout_of(strategy)
    sizes = steps.EXTEND_SIZES
    piece = next(turns.pieces(turns.frame_of(cache), start, lengths, layout, sizes))
    width = cache.recent.shape[1] + 1
    shape = *piece.order.shape, *[width] * (width > 1)
    shards = NamedSharding(mesh, P("data", "seq"))
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=shards)
    where = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=shards)
    row = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    recent = jax.ShapeDtypeStruct(cache.recent.shape, jnp.int32)
    fn = steps.jitted(steps.prefill_piece, True)
    arrays = ids, where, row, recent, piece.halos
    return fn, (_model(model, mesh, rules), cache, *arrays, strategy, piece.used)


def decode_program(
    model: Any, mesh: Mesh, *, max_len: int, batch_size: int = 1, rules: Rules = DEFAULT
) -> tuple[Callable, tuple]:
    """The program of `jaxcp.decode_step` with a cache for `max_len` tokens."""
    cache = _cache(model, mesh, batch_size, max_len)
    token = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return steps.jitted(steps.decode_tokens, True), (_model(model, mesh, rules), cache, token)


def _model(model, mesh: Mesh, rules: Rules):
    def placed(leaf):
        def on_mesh(x, spec):
            sharding = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return leaf.replace(jax.tree.map(on_mesh, leaf.get_value(), parts_of(leaf, rules)))

    return jax.tree.map(placed, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _cache(model, mesh: Mesh, batch_size: int, max_len: int):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.eval_shape(lambda: model.init_cache(batch_size, max_len))
