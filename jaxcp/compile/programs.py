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
from jaxcp.inference import programs, steps, turns
from jaxcp.inference.batch import resting, resting_chunk
from jaxcp.inference.geometry import FEW, geometry_of
from jaxcp.inference.programs import LINES, no_seats
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


def engine_programs(
    model: Any,
    mesh: Mesh,
    *,
    max_len: int,
    max_rows: int = 1,
    pool_tokens: int | None = None,
    drafts: int = 0,
    cache_dtype: str | None = None,
    strategy: Strategy | None = None,
    rules: Rules = DEFAULT,
) -> dict[str, tuple[Callable, tuple]]:
    """The programs of an `Engine` with these options, by name: "decode", "few" with `drafts`,
    "chunk of N" for every size of chunks, and "R chunks of N" with several rows.

    >>> fn, args = engine_programs(jaxcp.abstract_model(config), mesh, max_len=131_072)["decode"]
    """

    def shaped(arrays, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays
        )

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        g = geometry_of(
            model, max_len=max_len, max_rows=max_rows, pool_tokens=pool_tokens, memory=None,
            cache_dtype=cache_dtype, drafts=drafts,
        )  # fmt: skip
        pool = jax.eval_shape(lambda: model.init_pool(**g.room()))
    rows = g.groups * g.row_sizes[-1]
    seats = jax.eval_shape(lambda: no_seats(g, model.config.vocab_size))
    numbers = shaped(resting(rows, g), LINES)
    state = _model(model, mesh, rules), pool, shaped(seats, LINES)
    made: dict[str, tuple[Callable, tuple]] = {}
    made["decode"] = programs.program(programs.decode), (*state, numbers, g)
    if drafts:
        shape = rows, FEW, *[g.ngram] * (g.ngram > 1)
        ids = shaped(np.zeros(shape, np.int32), LINES)
        made["few"] = programs.program(programs.few), (*state, ids, numbers, g)

    def chunks(size, rows, g):
        chunk = resting_chunk(size, g.groups * rows, g)
        tokens = P("data", "seq" if chunk.sharded else None)
        arrays = shaped((chunk.ids, chunk.positions, chunk.following), tokens)
        static = g, chunk.sharded, strategy
        arguments = *state, *arrays, shaped(chunk.numbers, LINES), *static
        return programs.program(programs.chunk), arguments

    made |= {f"chunk of {size}": chunks(size, 1, g) for size in g.chunk_sizes}
    if g.together is not None:
        rows, size, narrow = g.together
        made[f"{rows} chunks of {size}"] = chunks(size, rows, narrow)
    return made


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
