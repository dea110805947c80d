# SPDX-License-Identifier: Apache-2.0
"""The programs of a runner, as functions of arrays: a step of decoding, guesses, a chunk, copies.

Each takes the pool and the seats, which it donates, and gives them as they are afterwards. What a
step samples stays in the seats, where the next one finds it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxcp.attention.pool import OverPool, copied
from jaxcp.context_parallel.overlap import compiler_options
from jaxcp.context_parallel.shards import on_shards
from jaxcp.inference.batch import columns
from jaxcp.inference.drafts import at, drafts
from jaxcp.inference.geometry import FEW, Geometry
from jaxcp.inference.masks import words
from jaxcp.inference.penalties import Said, nothing_said, with_row
from jaxcp.inference.steps import logits_at
from jaxcp.inference.turns import layout_of
from jaxcp.inference.verify import Verified, no_drafts, sampled, verified
from pallas_kernels import PAD_POSITION
from pallas_kernels.dispatch import target_platform

LINES = P("data")
"""Mesh axes of what has a line for each row of a batch, or for each seat."""


class Seats(NamedTuple):
    """Arrays of what devices remember of running requests, by the row of the seat."""

    recent: jax.Array | np.ndarray
    """int32 `[max_rows, ngram]`: the latest token, which is sampled and not computed, and those
    before it."""
    said: Said
    allowed: jax.Array | np.ndarray
    """int32 `[max_rows, words]`: bits of the tokens that a grammar allows next."""


def no_seats(geometry: Geometry, vocab_size: int) -> Seats:
    """Make the seats that nobody has, on the host."""
    seats = geometry.seats
    recent = np.zeros((seats, geometry.ngram), np.int32)
    bits = np.zeros((seats, words(vocab_size)), np.int32)
    return Seats(recent, nothing_said(seats, vocab_size), bits)


def decode(model, pool, seats, numbers, geometry):
    """`(tokens after each row's, pool, seats)`; a row at its end rests."""
    row = columns(numbers, geometry)
    latest = on_shards(_latest, (LINES,) * 4, LINES)
    window = latest(seats.recent, row["line"], row["late"], row["window"])
    token = window[:, :1]
    over = (row["late"] > 0) & ((token == row["stops"]).any(1) | (token[:, 0] < 0))
    row["added"] = jnp.where(over, 0, row["added"])
    row["state"] = jnp.where(row["added"] > 0, row["state"], geometry.states)
    positions = jnp.where(row["added"] > 0, row["before"], PAD_POSITION)[:, None]
    ids = window if geometry.ngram == 1 else window[:, None]
    row |= {"window": window}
    return _step(model, pool, seats, row, ids, positions, geometry, None, sharded=False)


def few(model, pool, seats, ids, numbers, geometry):
    """`(tokens after each row's last and after right guesses, pool, seats)`."""
    row = columns(numbers, geometry)
    places = jnp.arange(FEW, dtype=jnp.int32)
    positions = row["before"][:, None] + places
    positions = jnp.where(places < row["added"][:, None], positions, PAD_POSITION)
    hidden, state, attend = _forward(model, pool, row, ids, positions, geometry, sharded=False)
    newest = ids if geometry.ngram == 1 else ids[..., 0]
    found, said = verified(model.logits(hidden), newest, seats.said, seats.allowed, row)
    latest = row["added"] - 1 - row["drafts"] + found.accepted
    window = jnp.where((places == latest[:, None])[..., None], ids.reshape(*newest.shape, -1), 0)
    token = jnp.where(places[:, None] == found.accepted, found.tokens, 0).sum(0)
    pool = attend.pool_after
    if geometry.drafting:
        known = places < latest[:, None]
        after = jnp.pad(newest[:, 1:], [(0, 0), (0, 1)])
        following = jnp.where(known, after, token[:, None])
        state = at(model.draft(state, following, positions, attend), latest)
        drafted, pool = drafts(
            model, attend.pool_after, state, row["before"] + latest, row, geometry.drafting
        )
        found = found._replace(drafts=drafted)
    return found, pool, _with_sampled(seats, row | {"window": window.sum(1)}, token, said)


def chunk(model, pool, seats, ids, positions, following, numbers, geometry, sharded, strategy):
    """`(the token after the chunk, pool, seats)`."""
    row = columns(numbers, geometry)
    options = {"strategy": strategy, "layout": layout_of(strategy)} if sharded else {}
    return _step(
        model, pool, seats, row, ids, positions, geometry, following, sharded=sharded, **options
    )


def arranged(pool, said, pages, states, row, line):
    """`(pool, said)` after copies of pages and states, see `copied`, and with what the row `line`
    has said, see `with_row`."""
    return copied(pool, pages, states), with_row(said, row, line)


def _step(model, pool, seats, row, ids, positions, geometry, following, **options):
    """Compute tokens and sample one behind them; `following`: see `Chunk`, None: that one."""
    hidden, state, attend = _forward(model, pool, row, ids, positions, geometry, **options)
    last = row["before"] + row["added"] - 1
    logits = logits_at(model, hidden, positions, last)
    token, logprobs, said = sampled(logits, last, seats.said, seats.allowed, row)
    one = jax.tree.map(lambda x: x[None], (token, logprobs))
    found = Verified(one[0], jnp.zeros_like(token), one[1], no_drafts(token))
    if geometry.drafting:  # what the layer keeps, for drafts to come
        new = token[:, None]
        following = new if following is None else jnp.where(following < 0, new, following)
        model.draft(state, following, positions, attend)
    return found, attend.pool_after, _with_sampled(seats, row, token, said)


def _forward(model, pool, row, ids, positions, geometry, **options):
    """`(hidden, what drafts begin with, attend)` of the trunk."""
    attend = OverPool(
        pool, positions, row["before"], row["added"], pages=row["pages"], states=row["state"],
        **options,
    )  # fmt: skip
    if not geometry.drafting:
        return model.forward(ids, positions, attend)[0], None, attend
    state, _ = model.trunk(ids, positions, attend)
    return model.hidden_of(state), state, attend


def _with_sampled(seats, row, token, said) -> Seats:
    renewed = on_shards(_renewed, (LINES,) * 4, LINES)
    recent = renewed(seats.recent, row["line"], token, row["window"])
    return seats._replace(recent=recent, said=said)


def _latest(recent, line, late, window):
    """`[B, ngram]`: the latest tokens of each row, sampled just now or known to the host."""
    return jnp.where(late[:, None] > 0, recent.at[line].get(mode="clip"), window)


def _renewed(recent, line, token, window):
    new = jnp.concatenate([token[:, None], window[:, :-1]], axis=1)
    return recent.at[line].set(new, mode="drop")


OPTIONS: dict[Any, tuple] = {
    decode: ((4,), (1, 2)),
    few: ((5,), (1, 2)),
    chunk: ((7, 8, 9), (1, 2)),
    arranged: ((), (0, 1)),
}
"""Static arguments, and donated ones, of each program."""


def program(fn: Any) -> Any:
    """Compile one of `OPTIONS` for the platform in scope, when it is called."""
    return _compiled(fn, target_platform())


@functools.cache
def _compiled(fn, platform: str):
    static, donated = OPTIONS[fn]
    return jax.jit(
        fn, static_argnums=static, donate_argnums=donated,
        compiler_options=compiler_options(platform),
    )  # fmt: skip
