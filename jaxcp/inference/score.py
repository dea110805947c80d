# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a prompt's own tokens, by one forward pass over all of it.

An engine does not keep those of the prompts that it computes: tokens that the pool knows are not
computed again, and have none.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxcp.context_parallel import Ring, Strategy
from jaxcp.context_parallel.overlap import compiler_options
from jaxcp.data.windows import windows
from jaxcp.inference.logprobs import LogProbs, TokenLogProbs
from jaxcp.inference.sampling import MOST_LOGPROBS
from jaxcp.layers.cross_entropy import walk
from jaxcp.processes import everywhere
from jaxcp.sharding import gathered_beside
from pallas_kernels.dispatch import target_platform

CHUNK = 256
"""Tokens of a device whose logits are held at a time."""
NARROWEST = 64


def score(
    model: Any,
    ids: Sequence[int],
    count: int,
    *,
    strategy: Strategy | None = None,
    alone: contextlib.AbstractContextManager | None = None,
) -> list[TokenLogProbs]:
    """Log-probabilities of the tokens after the first, each by all those before it, and of `count`
    others in its place.

    Lengths are padded to powers of two: a program for each. A device holds the logits of `CHUNK`
    tokens at a time, float32.

    Args:
      ids: ids of the model, on the host.
      strategy: the strategy; None is `Ring()`.
      alone: held while the pass is sent to the devices, by whoever else sends programs there too.
    Raises:
      FloatingPointError: a log-probability is NaN.
    """
    strategy = Ring() if strategy is None else strategy
    ids = np.asarray(ids, np.int32).tolist()
    with contextlib.nullcontext() if alone is None else alone:
        found = _sent(model, ids, strategy)
    found = _read(found, len(ids), strategy.layout)
    if np.isnan(found.chosen).any():
        raise FloatingPointError(
            "log-probabilities are NaN: weights or activations are, or overflow; look at what "
            "`jaxcp.load` logged, or compute in float32"
        )
    rows = zip(ids[1:], *found, strict=True)
    return [LogProbs(*arrays).read(token, count) for token, *arrays in rows]


def _sent(model, ids, strategy) -> LogProbs:
    """Arrays of all places, where and in which order the layout has them."""
    mesh = jax.sharding.get_abstract_mesh().shape
    rows, shards, length = mesh.get("data", 1), mesh.get("seq", 1), len(ids)
    width = _width(length)
    tokens, targets = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    tokens[:, :length], targets[:, : length - 1] = ids, ids[1:]
    layout = strategy.layout
    arrays = {
        "tokens": windows(tokens, getattr(model.config, "ngram_width", 1)),
        "targets": targets,
        "positions": np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape),
    } | ({"segment_ids": np.zeros_like(tokens)} if layout.by_segment else {})
    program = _program(strategy, target_platform(), width)
    return program(model, jax.tree.map(_put, layout.permute(arrays, shards)))


def _read(found, length, layout) -> LogProbs:
    """Arrays of all tokens but the first, in natural order, on the host."""
    shards = jax.sharding.get_abstract_mesh().shape.get("seq", 1)
    in_order = (layout.inverse(np.asarray(x), shards, _width(length)) for x in everywhere(found))
    return LogProbs(*(x[0, : length - 1] for x in in_order))


def _width(length) -> int:
    return max(NARROWEST, 1 << (length - 1).bit_length())


@functools.cache
def _program(strategy: Strategy, platform: str, width: int) -> Callable:
    """Make the program that computes `LogProbs` `[B, T, ...]` of a batch of so many tokens a row,
    before the layout fills it up."""
    consecutive = not strategy.layout.by_segment

    def scored(model, batch):
        x, _ = model.hidden(
            batch["tokens"], batch["positions"], segment_ids=batch.get("segment_ids"),
            strategy=strategy, consecutive=consecutive, length=width,
        )  # fmt: skip
        return _log_probs(x, model.head_kernel(), batch["targets"])

    return jax.jit(scored, compiler_options=compiler_options(platform))


def _log_probs(x, head, targets):
    """`LogProbs` of every target, each shard of `data` and `seq` for its own tokens."""

    def local(x, head, targets):
        found = walk(x, head, targets, chunk=CHUNK, of=_of_chunk)
        return jax.tree.map(lambda leaf: leaf.reshape(*targets.shape, *leaf.shape[1:]), found)

    if jax.sharding.get_abstract_mesh().empty:
        return local(x, head, targets)
    rows = P("data", "seq")
    return jax.shard_map(
        local, in_specs=(rows, P(), rows), out_specs=rows, axis_names={"data", "seq"}
    )(x, gathered_beside(head, rows), targets)


def _of_chunk(hidden, targets, *, head):
    logits = jnp.einsum("td,dv->tv", hidden, head, preferred_element_type=jnp.float32)
    every = jax.nn.log_softmax(logits, axis=-1)
    here = jax.lax.broadcasted_iota(jnp.int32, every.shape, 1) == targets[:, None]
    chosen = jnp.sum(jnp.where(here, every, 0.0), axis=-1)
    best, ids = jax.lax.top_k(every, min(MOST_LOGPROBS, every.shape[-1]))
    return LogProbs(chosen, ids, best)


def _put(x: np.ndarray) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.asarray(x)
    return jax.device_put(x, P("data", "seq"))
