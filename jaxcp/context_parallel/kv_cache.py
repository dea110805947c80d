# SPDX-License-Identifier: Apache-2.0
"""The sequence-sharded cache, and the two ways to attend over it.

A slot belongs to no position: it holds whatever token was written there, and its position says
which. So new tokens go wherever there is room, shards fill evenly over any number of turns, and
an empty slot (position `PAD_POSITION`) masks itself.

`Prefill`: many new tokens, sharded like the cache; keys travel by the strategy.
`Extend`: few new tokens, the same on every device; each attends to its own shard and one
collective a layer merges `(out, lse)`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels import PAD_POSITION, decode_attention, flash_attention
from pallas_kernels.decode_attention import MAX_QUERIES
from pallas_kernels.flash_attention import Mask, apply_sinks, attention_forward
from pallas_kernels.online_softmax import merge_stacked

SLACK = 64
"""Slots a shard has beyond its share of `max_len`, for the pads of a short turn.

`2 * shards` come on top: so far ahead of another may it be (see `jaxcp.inference.steps`).
"""
AXIS = "seq"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "positions", "fill", "lengths", "recent"],
    meta_fields=["max_len"],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, sharded over slots. S = shards * slots per shard."""

    k: tuple[jax.Array, ...]  # a layer: [B, S, K, H]
    v: tuple[jax.Array, ...]
    positions: jax.Array  # int32 [B, S]
    fill: jax.Array  # int32 [shards]: slots in use
    lengths: jax.Array  # int32 [B]: tokens in the cache; the next token's position
    recent: jax.Array  # int32 [B, W - 1]: the latest token ids, newest first, for n-gram embeddings
    max_len: int

    @property
    def shards(self) -> int:
        return self.fill.shape[0]

    @property
    def slots(self) -> int:
        """Slots a shard."""
        return self.positions.shape[1] // self.shards

    def bytes_per_device(self) -> int:
        """Bytes of keys and values that one device holds."""
        return sum(x.addressable_shards[0].data.nbytes for x in (*self.k, *self.v))


def empty_cache(
    *,
    layers: int,
    batch_size: int,
    max_len: int,
    num_kv_heads: int,
    head_dim: int,
    dtype,
    recent: int = 0,
) -> KVCache:
    """A cache for `max_len` tokens a row, on the mesh in scope."""
    if batch_size < 1 or max_len < 1:
        raise ValueError(
            f"a cache needs batch_size >= 1 and max_len >= 1; got {batch_size} and {max_len}"
        )
    shards = _shards()
    slots = -(-max_len // shards) + SLACK + 2 * shards
    shape = (batch_size, shards * slots, num_kv_heads, head_dim)

    @jax.jit
    def make():
        def zeros():
            return tuple(
                _on_mesh(jnp.zeros(shape, dtype), P("data", AXIS, "model", None))
                for _ in range(layers)
            )

        positions = jnp.full(shape[:2], PAD_POSITION, jnp.int32)
        return KVCache(
            k=zeros(),
            v=zeros(),
            positions=_on_mesh(positions, P("data", AXIS)),
            fill=_on_mesh(jnp.zeros(shards, jnp.int32), P(None)),
            lengths=_on_mesh(jnp.zeros(batch_size, jnp.int32), P("data")),
            recent=_on_mesh(jnp.full((batch_size, recent), -1, jnp.int32), P("data", None)),
            max_len=max_len,
        )

    return make()


class Prefill:
    """Attention of new tokens `[B, T]` (sharded over `seq`) over the cache, which it fills.

    Every shard writes its `T / shards` new rows behind its fill; `used` (static) bounds the slots
    a shard holds after that, and only those travel.
    """

    def __init__(self, cache: KVCache, positions, *, strategy: Strategy, used: int):
        if strategy.reproducible:
            raise NotImplementedError("prefill over a cache has no reproducible form; use Ring()")
        self.cache, self.positions, self.strategy, self.used = cache, positions, strategy, used
        self.k, self.v = list(cache.k), list(cache.v)
        tokens = P("data", AXIS)
        write = _on_shards(_write, (tokens, tokens, P(None)), tokens)
        self.kv_positions = write(cache.positions, positions, cache.fill)

    def __call__(self, q, k, v, *, layer, window, sinks=None, scale=None, soft_cap=None):
        heads, tokens = P("data", AXIS, "model", None), P("data", AXIS)
        local = functools.partial(
            self._local, mask=Mask(window=window), **_options(q, scale, soft_cap)
        )
        specs = (*[heads] * 5, tokens, tokens, P(None), P("model"))
        run = _on_shards(local, specs, (heads,) * 3)
        state = self.k[layer], self.v[layer], self.positions, self.kv_positions, self.cache.fill
        out, self.k[layer], self.v[layer] = run(q, k, v, *state, _some(sinks))
        return out

    def _local(self, q, k, v, cache_k, cache_v, q_pos, kv_pos, fill, sinks, *, mask, **options):
        cache_k, cache_v = _write(cache_k, k, fill), _write(cache_v, v, fill)
        seen_k, seen_v = (x[:, : self.used].astype(q.dtype) for x in (cache_k, cache_v))
        kv_pos = kv_pos[:, : self.used]
        if jax.sharding.get_abstract_mesh().empty:
            positions = {"q_positions": q_pos, "kv_positions": kv_pos}
            out, lse = flash_attention(
                q, seen_k, seen_v, **positions, window=mask.window, **options
            )
        else:
            arrays = q, seen_k, seen_v, q_pos, kv_pos, None, None
            out, lse = self.strategy.attend(
                *arrays, axis_name=AXIS, mask=mask, implementation=None, **options
            )
        return _with_sinks(out, lse, sinks), cache_k, cache_v

    def filled(self, added, counts, recent) -> KVCache:
        """The cache after all layers: `added [B]` tokens a row, `counts [shards]` slots a shard."""
        return _after(self, added, counts, recent)


class Extend:
    """Attention of a few new tokens `[B, T]` over the cache, which they join.

    The tokens are the same on every shard; their keys are dealt out one by one, the emptiest shard
    first. One all-gather a layer carries the partial results: `shards * B * T * N * (H + 1)`
    float32.
    """

    def __init__(self, cache: KVCache, positions):
        self.cache, self.positions = cache, positions
        self.k, self.v = list(cache.k), list(cache.v)
        # the order in which shards receive: the emptiest is 0
        self.turn = jnp.argsort(jnp.argsort(cache.fill)).astype(jnp.int32)
        tokens = P("data", AXIS)
        local = functools.partial(_deal, pad=PAD_POSITION)
        write = _on_shards(local, (tokens, P("data"), P(None), P(None)), tokens)
        self.kv_positions = write(cache.positions, positions, cache.fill, self.turn)

    def __call__(self, q, k, v, *, layer, window, sinks=None, scale=None, soft_cap=None):
        sharded, whole = P("data", AXIS, "model", None), P("data", None, "model", None)
        local = functools.partial(self._local, window=window, **_options(q, scale, soft_cap))
        ids = P("data"), P("data", AXIS), P(None), P(None)
        specs = (*[whole] * 3, *[sharded] * 2, *ids, P("model"))
        run = _on_shards(local, specs, (whole, sharded, sharded))
        state = self.k[layer], self.v[layer], self.positions, self.kv_positions, self.cache.fill
        out, self.k[layer], self.v[layer] = run(q, k, v, *state, self.turn, _some(sinks))
        return out

    def _local(self, q, k, v, cache_k, cache_v, q_pos, kv_pos, fill, turn, sinks, **options):
        cache_k, cache_v = _deal(cache_k, k, fill, turn), _deal(cache_v, v, fill, turn)
        out, lse = _attend(q, cache_k, cache_v, q_pos, kv_pos, **options)
        if not jax.sharding.get_abstract_mesh().empty:
            packed = lax.all_gather(jnp.concatenate([out, lse[..., None]], axis=-1), AXIS)
            out, lse = merge_stacked(packed[..., :-1], packed[..., -1])
        return _with_sinks(out, lse, sinks).astype(q.dtype), cache_k, cache_v

    def extended(self, added, recent) -> KVCache:
        """The cache after all layers, with `added [B]` tokens a row."""
        shards = self.cache.shards
        dealt = (added.max() - self.turn + shards - 1) // shards
        return _after(self, added, dealt, recent)


def _attend(q, k, v, q_pos, kv_pos, *, window, scale, soft_cap):
    """`(out, lse)` of this shard, out in float32: no backward pass comes, so few rows may split."""
    options = {"scale": scale, "soft_cap": soft_cap, "out_dtype": jnp.float32}
    if q.shape[1] <= MAX_QUERIES:
        positions = {"q_positions": q_pos, "kv_positions": kv_pos}
        return decode_attention(q, k, v, **positions, window=window, **options)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    arrays = q, k, v, q_pos, kv_pos, None, None
    return attention_forward(*arrays, mask=Mask(window=window), **options)


def _options(q, scale, soft_cap):
    return {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "soft_cap": soft_cap}


def _some(sinks):
    """Sinks as a tree: empty where there are none."""
    return () if sinks is None else (sinks,)


def _with_sinks(out, lse, sinks):
    """`out` of finished rows with the sinks `_some` gave: once, after the last merge."""
    return apply_sinks(out, lse, *sinks)[0] if sinks else out


def _after(step: Prefill | Extend, added, slots, recent) -> KVCache:
    """The cache that `step` leaves: `added [B]` tokens a row in `slots [shards]` new slots."""
    cache = step.cache
    return dataclasses.replace(
        cache,
        k=tuple(step.k),
        v=tuple(step.v),
        positions=step.kv_positions,
        fill=cache.fill + slots,
        lengths=cache.lengths + added,
        recent=recent,
    )


def _write(cache, new, fill):
    """This shard's rows `new` behind what it holds."""
    return lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), fill[_rank()], axis=1)


def _deal(cache, new, fill, turn, pad=0):
    """Of rows `new [B, T, ...]`, those that fall to this shard, behind what it holds.

    Every shard writes as many rows; those too many are pads, which the next tokens overwrite.
    """
    shards = fill.shape[0]
    rows = [(0, 0)] * new.ndim
    rows[1] = (0, -new.shape[1] % shards)
    new = jnp.pad(new, rows, constant_values=pad).reshape(new.shape[0], -1, shards, *new.shape[2:])
    mine = lax.dynamic_index_in_dim(new, turn[_rank()], axis=2, keepdims=False)
    return _write(cache, mine, fill)


def _shards() -> int:
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def _rank():
    return 0 if jax.sharding.get_abstract_mesh().empty else lax.axis_index(AXIS)


def _on_mesh(x, spec):
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec)


def _on_shards(local, in_specs, out_specs):
    """`local` on every device's shards; as it is where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return local

    def call(*args):
        moved = [jax.sharding.reshard(x, spec) for x, spec in zip(args, in_specs, strict=True)]
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*moved)

    return call
