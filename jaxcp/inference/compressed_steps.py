# SPDX-License-Identifier: Apache-2.0
"""`prefill` and `decode_step` over a `CompressedCache`, whose new tokens keep a layout's order.

Blocks are compressed where runs of consecutive tokens lie, so every turn is permuted by itself;
what the cache holds is on every device and need not be balanced.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxcp.context_parallel import Ring
from jaxcp.context_parallel.compressed_cache import CompressedStep
from jaxcp.context_parallel.overlap import compiler_options
from pallas_kernels import PAD_POSITION
from pallas_kernels.dispatch import target_platform

EXTEND_SIZES = (1, 8, 32, 64)
"""Widths to which short turns are padded; longer turns are sharded."""


def prefill_compressed(model, cache, tokens, lengths, strategy, donate):
    """`jaxcp.prefill` of checked tokens int `[B, T]` and lengths int32 `[B]`, on the host."""
    strategy = Ring() if strategy is None else strategy
    start = np.asarray(cache.lengths)
    sharded = is_sharded(int(start.max()), tokens.shape[1])
    tokens, positions = laid_out(tokens, start, lengths, sharded, strategy)
    if not jax.sharding.get_abstract_mesh().empty:
        tokens, positions = jax.device_put((tokens, positions), tokens_spec(sharded))
        lengths = jax.device_put(lengths, P("data"))
    return _jitted(donate)(model, cache, tokens, positions, lengths, sharded, strategy)


def is_sharded(held: int, width: int) -> bool:
    """Whether a turn of `width` tokens on a cache of `held` is; else every device has it whole."""
    return held == 0 or width > EXTEND_SIZES[-1]


def tokens_spec(sharded: bool) -> P:
    return P("data", "seq" if sharded else None)


def laid_out(tokens, start, lengths, sharded, strategy):
    """Tokens and positions, padded; in the strategy's layout over the mesh in scope if sharded."""
    width = tokens.shape[1]
    padded = _bucket(width) if sharded else next(s for s in EXTEND_SIZES if s >= width)
    offsets = np.arange(padded, dtype=np.int32)
    real = offsets < lengths[:, None]
    positions = np.where(real, start[:, None] + offsets, PAD_POSITION).astype(np.int32)
    tokens = np.pad(tokens, [(0, 0), (0, padded - width)]).astype(np.int32)
    if sharded:
        shards = jax.sharding.get_abstract_mesh().shape.get("seq", 1)
        batch = strategy.layout.permute({"tokens": tokens, "positions": positions}, shards)
        tokens, positions = batch["tokens"], batch["positions"]
    return tokens, positions


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


def _bucket(size: int) -> int:
    """The next of eight sizes between powers of two: few compilations, little padding."""
    step = max(1, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
