# SPDX-License-Identifier: Apache-2.0
"""Drafts by a model's own MTP layer, applied again to what it drafts.

The layer keeps keys of its own, at place i made of the trunk's state there and of the token at
i + 1: so a step first samples, then fills these, and drafts from the last one. What it keeps behind
a row's tokens is written anew when these are known. Where a prefix that rows share ends, the next
token was another's: a draft there may be worse, the answer is the same.

Source: arXiv 2412.19437; recurrent use, one place further each time, as vLLM and SGLang serve Hy3.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcp.attention.pool import OverPool, Pool
from jaxcp.inference.sampling import whole_rows
from jaxcp.models.drafting import MTP
from pallas_kernels import PAD_POSITION


def drafts(
    model: Any, pool: Pool, state: Any, position: Any, row: dict[str, Any], count: int
) -> tuple[jax.Array, Pool]:
    """`(drafts int32 [count, B], pool)`: the likeliest tokens behind the one that was sampled.

    -1 where the row has no page for the token before.

    Args:
      state: what the MTP layer made at `position [B]`, `[B, 1, ...]`, of the token sampled there.
      row: see `batch.columns`.
    """
    best = _best(model, state)
    found, layer = [best], pool.layers[MTP]
    if count > 1:

        def step(carry, i):
            state, token, layer = carry
            before = position + 1 + i
            there = (row["added"] > 0) & (before < row["room"]) & (token >= 0)
            places = jnp.where(there, before, PAD_POSITION)[:, None]
            attend = OverPool(
                Pool({MTP: layer}, pool.shards, pool.page), places, before,
                there.astype(jnp.int32), pages=row["pages"], states=row["state"], sharded=False,
            )  # fmt: skip
            state = model.draft(state, token[:, None], places, attend)
            token = jnp.where(there, _best(model, state), -1)
            return (state, token, attend.layers[MTP]), token

        start = state, best, layer
        (_, _, layer), rest = lax.scan(step, start, jnp.arange(count - 1, dtype=jnp.int32))
        found.append(rest)
    pool = Pool(pool.layers | {MTP: layer}, pool.shards, pool.page)
    return jnp.concatenate([found[0][None], *found[1:]]), pool


def at(state: Any, places: jax.Array) -> Any:
    """`[B, 1, ...]` of `state [B, T, ...]`, which no shard divides, at the column `places [B]`."""
    here = jnp.arange(state.shape[1], dtype=jnp.int32) == places[:, None]
    here = here.reshape(*here.shape, *[1] * (state.ndim - 2))
    return jnp.where(here, state, 0).sum(1, keepdims=True).astype(state.dtype)


def _best(model, state):
    logits = model.logits(model.drafted(state))[:, 0]
    return whole_rows(logits).argmax(-1).astype(jnp.int32)
