# SPDX-License-Identifier: Apache-2.0
"""Blocks of consecutive tokens summed up in one entry each, over a sequence that is sharded.

Block w of a row is its positions `w * ratio .. (w + 1) * ratio - 1`, wherever they lie. A shard
sums up what it has of every block as `(value, lse)` per channel, the same currency as attention's,
so parts of a block merge in any order, and any layout whose shards hold few runs of consecutive
tokens will do: nothing has to be aligned. The shard with a block's last token owns its entry.

Communication a device: one all-gather of the parts that others need, at most `runs` a shard (twice
as many where blocks overlap) of `2 * channels` float32; no token travels. Backward: as much.
Memory: the local tokens' channels once more, in float32.

Source: compressed attention of DeepSeek-V4; its report sends the tokens themselves to the right.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxcp.context_parallel.shards import on_shards
from jaxcp.layout import Layout, Zigzag
from pallas_kernels import PAD_POSITION

NONE = -2
"""The number of no block, and of none that comes after another."""


class Parts(NamedTuple):
    """Sums over some tokens of M blocks each; those of one block over several shards merge.

    Of a block there are one or, where entries overlap, two halves: of the first and of the second
    half of a token's channels. A batch has an axis B before M.
    """

    blocks: Int[Array, "*B M"]
    """Numbers of the blocks; `NONE` where there is none."""
    counts: Int[Array, "*B M halves"]
    """Tokens that are summed."""
    values: Float[Array, "*B M halves D"]
    lse: Float[Array, "*B M halves D"]


def compress(
    values: Float[Array, "B T C"],
    gates: Float[Array, "B T C"],
    positions: Int[Array, "B T"],
    *,
    ratio: int,
    overlap: bool,
    layout: Layout | None = None,
    axis_name: str = "seq",
) -> tuple[Float[Array, "B E D"], Int[Array, "B E"]]:
    """Entries (float32) of all complete blocks, and which block each is; `PAD_POSITION`: none.

    Entry w is `sum_i softmax(gates)_i * values_i` channel by channel, over the tokens i of block w.
    With `overlap`, C is 2 D: over the first halves of the tokens of block w - 1 and the second
    halves of those of block w. A gate of -inf leaves its token out; of nothing the entry is 0.

    Entries lie with the owner of the block's last token, `[B, E]` sharded as `[B, T]` is. A row's
    positions must be those of one document, ascending on every shard. What is not so, or lies in
    another layout than `layout` (default zigzag), gives entries of NaN.

    Raises:
      NotImplementedError: a layout that scatters consecutive tokens over shards.
    """
    shards = shards_of(axis_name)
    runs = runs_of(Zigzag() if layout is None else layout, shards, positions.shape[1] // shards)
    local = functools.partial(
        compress_shard, ratio=ratio, overlap=overlap, runs=runs, axis_name=axis_name, shards=shards
    )
    tokens = P("data", axis_name)
    run = on_shards(local, (tokens, tokens, tokens), (tokens, tokens))
    return run(values, gates, positions)


def compress_shard(
    values, gates, positions, pending=None, end=None, *, ratio, overlap, runs, axis_name, shards
):  # fmt: skip
    """`compress` on local shards; with `pending`, also what is pending after these tokens.

    `pending`: `Parts` of the blocks that tokens before these began, the same on every shard;
    `end [B]`: the position after a row's last token.
    """
    halves = 2 if overlap else 1
    slots = positions.shape[1] // ratio + 2 * runs  # a run touches at most two more than it fills
    one = functools.partial(_of_row, ratio=ratio, slots=slots, halves=halves, send=runs * halves)
    parts, sent, owned, good = jax.vmap(one)(
        values.astype(jnp.float32), gates.astype(jnp.float32), positions
    )
    # the first of two halves is of the next block's entry
    join = jax.vmap(functools.partial(_joined, shift=jnp.arange(halves - 1, -1, -1)))
    everyone = sent
    if shards > 1:
        everyone = jax.tree.map(_flat, lax.all_gather(sent, axis_name, axis=1))
        sender = jnp.arange(shards * runs * halves) // (runs * halves)
        others = jnp.where(sender == lax.axis_index(axis_name), NONE, everyone.blocks)
        parts = join(parts, everyone._replace(blocks=others))
        good = lax.all_gather(good, axis_name).all(0)
    if pending is not None:
        parts = join(parts, pending)
        both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), everyone, pending)
        pending = jax.vmap(functools.partial(_joined, shift=jnp.zeros(halves, jnp.int32)))(
            _no_parts(end // ratio, pending), both
        )
    blocks, counts, values, lse = parts
    high = lax.stop_gradient(lse).max(2, keepdims=True)
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(high), 0.0, high))
    total = weights.sum(2)
    entries = (weights * values).sum(2) / jnp.where(total == 0, 1.0, total)
    # the block before the first is not there
    complete = (counts == ratio) | ((jnp.arange(halves) < halves - 1) & (blocks == 0)[..., None])
    broken = ~(complete.all(2) & good[:, None])[..., None]
    entries = jnp.where(owned[..., None], jnp.where(broken, jnp.nan, entries), 0.0)
    blocks = jnp.where(owned, blocks, PAD_POSITION)
    return (entries, blocks) if pending is None else (entries, blocks, pending)


def no_pending(batch: int, size: int, overlap: bool):
    """Make the parts that are pending before the first token, of entries of `size` channels."""
    halves = 2 if overlap else 1
    shape = batch, halves, halves
    return Parts(
        jnp.full(shape[:2], NONE, jnp.int32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros((*shape, size), jnp.float32),
        jnp.full((*shape, size), -jnp.inf, jnp.float32),
    )


def _no_parts(newest, like):
    """Empty parts of the newest block, after the one before it where blocks overlap."""
    blocks = newest[:, None] - jnp.arange(like.counts.shape[1] - 1, -1, -1)
    counts, values = jnp.zeros_like(like.counts), jnp.zeros_like(like.values)
    return Parts(blocks, counts, values, jnp.full_like(like.lse, -jnp.inf))


def _of_row(values, gates, positions, *, ratio, slots, halves, send):
    """Sum up one row's local tokens, block by block: `(parts, sent, owned, good)`.

    `parts` of `slots` blocks, ascending, then `NONE`: of each and, in the first half, of the block
    before it, of which an overlapping entry takes the first halves. `sent`: `send` parts, of blocks
    whose entry another shard owns, each half of the block itself. `owned [slots]`: the block's last
    token is here. `good`: tokens ascend, and all of this fits.
    """
    places = _places(positions, ratio, slots)
    value, lse = _softmax_sums(values, gates, places, halves)
    counts = jnp.broadcast_to(places.member.sum(1)[:, None], (slots, halves))
    parts = Parts(places.blocks, counts, value, lse)
    owned = places.owned
    follows = jnp.concatenate([jnp.zeros(1, bool), jnp.diff(parts.blocks) == 1])
    needed = ~owned
    if halves == 2:  # by the owner of the next block's entry
        needed |= ~jnp.concatenate([(follows & owned)[1:], jnp.zeros(1, bool)])
    needed &= parts.blocks != NONE
    chosen = _where(needed, send)
    sent = jax.tree.map(lambda x: x[chosen], parts)
    sent = sent._replace(blocks=jnp.where(chosen < slots, sent.blocks, NONE))
    good = ((jnp.diff(positions) > 0) | (places.of_token[1:] == NONE)).all()
    good &= (places.begins.sum() <= slots) & (needed.sum() <= send)
    if halves == 2:
        parts = parts._replace(
            counts=_half_before(counts, follows, 0),
            values=_half_before(value, follows, 0.0),
            lse=_half_before(lse, follows, -jnp.inf),
        )
    return parts, sent, owned, good


class _Places(NamedTuple):
    """The places of one row's local tokens, block by block.

    Of positions 2 .. 9 with `ratio` 4, and room for four blocks; `N` is `NONE`:

        position        2 3 4 5 6 7 8 9
        of_token        0 0 1 1 1 1 2 2                             the block of each
        begins          x . x . . . x .                             at 0, 2, 6, then 8: out of range
        tokens          0 1 2 3 | 2 3 4 5 | 6 7 8 9 | 8 9 10 11     the `ratio` from each start on
        member          x x . . | x x x x | x x . . | . . .  .      those that are of the block
        blocks          0       | 1       | 2       | N
        owned           x       | x       | .       | .             3 and 7 are here, 11 is not
    """

    of_token: Int[Array, "T"]
    begins: Bool[Array, "T"]
    tokens: Int[Array, "M ratio"]
    member: Bool[Array, "M ratio"]
    blocks: Int[Array, "M"]
    owned: Bool[Array, "M"]


def _places(positions, ratio: int, slots: int) -> _Places:
    of_token = jnp.where(positions == PAD_POSITION, NONE, positions // ratio)
    before = jnp.concatenate([jnp.full(1, NONE), of_token[:-1]])
    begins = (of_token != before) & (of_token != NONE)
    tokens = _where(begins, slots)[:, None] + jnp.arange(ratio)
    block = jnp.where(tokens < positions.shape[0], of_token[tokens], NONE)
    blocks = block[:, 0]
    member = (block == blocks[:, None]) & (blocks != NONE)[:, None]
    owned = (member & (positions[tokens] == blocks[:, None] * ratio + ratio - 1)).any(1)
    return _Places(of_token, begins, tokens, member, blocks, owned)


def _softmax_sums(values, gates, places: _Places, halves: int):
    """`(value, lse) [M, halves, D]`: the sum of each block's values by the softmax of its gates."""
    shape = *places.tokens.shape, halves, values.shape[-1] // halves
    values, gates = values[places.tokens].reshape(shape), gates[places.tokens].reshape(shape)
    gates = jnp.where(places.member[..., None, None], gates, -jnp.inf)
    high = lax.stop_gradient(gates).max(1)
    high = jnp.where(jnp.isneginf(high), 0.0, high)
    weights = jnp.exp(gates - high[:, None])
    total = weights.sum(1)
    safe = jnp.where(total == 0, 1.0, total)
    value = (weights * values).sum(1) / safe
    return value, jnp.where(total == 0, -jnp.inf, high + jnp.log(safe))


def _where(flags, size: int):
    """Indices of the set flags, in order; then ones out of range."""
    count = flags.shape[0]
    indices = jnp.sort(jnp.where(flags, jnp.arange(count), count))[:size]
    return jnp.pad(indices, (0, size - indices.shape[0]), constant_values=count)


def _half_before(x, follows, empty):
    """`x [M, 2, ...]` whose first half is that of the block before."""
    before = jnp.concatenate([jnp.full_like(x[:1, 0], empty), x[:-1, 0]])
    before = jnp.where(follows.reshape(-1, *[1] * (before.ndim - 1)), before, empty)
    return jnp.stack([before, x[:, 1]], axis=1)


def _joined(parts, arrived, *, shift):
    """Parts of the same blocks, of one row, added to what is here.

    `shift [halves]`: by how much the number of the block that a half counts for is greater.
    """
    entry_of = arrived.blocks[:, None] + shift
    match = (parts.blocks[:, None, None] == entry_of) & (arrived.blocks != NONE)[:, None]
    rows = jnp.where(match.any(0), match.argmax(0), parts.blocks.shape[0])  # out of range: dropped
    at = rows, jnp.broadcast_to(jnp.arange(shift.shape[0]), rows.shape)
    high = lax.stop_gradient(parts.lse).at[at].max(lax.stop_gradient(arrived.lse), mode="drop")
    high = jnp.where(jnp.isneginf(high), 0.0, high)
    weight = jnp.exp(parts.lse - high)
    new_weight = jnp.exp(arrived.lse - high.at[at].get(mode="clip"))
    total = weight.at[at].add(new_weight, mode="drop")
    weighted = (weight * parts.values).at[at].add(new_weight * arrived.values, mode="drop")
    safe = jnp.where(total == 0, 1.0, total)
    lse = jnp.where(total == 0, -jnp.inf, high + jnp.log(safe))
    counts = parts.counts.at[at].add(arrived.counts, mode="drop")
    return Parts(parts.blocks, counts, weighted / safe, lse)


def _flat(x):
    """`[B, shards, K, ...]` as `[B, shards * K, ...]`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def in_order(entries, blocks, limit: int, axis_name: str | None = None):
    """Every shard's entries `[B, E, ...]` (a tree) by block: slot w holds block w.

    Runs on local shards inside shard_map (`axis_name`) or on whole arrays. `(entries, blocks)`,
    `[B, limit, ...]`: slots behind the last complete block hold zeros and `PAD_POSITION`.
    """
    if axis_name is not None:
        entries, blocks = lax.all_gather((entries, blocks), axis_name, axis=1, tiled=True)
    order = jnp.argsort(blocks, axis=1)[:, :limit]

    def one(x):
        return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)

    return jax.tree.map(one, entries), one(blocks)


def block_starts(blocks, ratio: int):
    """The position of the first token of each block."""
    return jnp.where(blocks == PAD_POSITION, PAD_POSITION, blocks * ratio)


def block_ends(blocks, ratio: int):
    """The position of the last token of each block: queries from there on see its entry."""
    return jnp.where(blocks == PAD_POSITION, PAD_POSITION, blocks * ratio + ratio - 1)


@functools.lru_cache(maxsize=64)
def runs_of(layout: Layout, shards: int, tokens: int) -> int:
    """Count the runs of consecutive tokens that a shard holds at most, `tokens` a shard."""
    if shards == 1:
        return 1
    padded = shards * tokens
    most = 1
    for pads in range(min(layout.padded_length(1, shards), padded)):
        if layout.padded_length(padded - pads, shards) != padded:
            continue
        for own in layout.order(padded - pads, shards).reshape(shards, tokens):
            own = own[own < padded - pads]
            most = max(most, 1 + int((np.diff(own) != 1).sum()))
    if most > max(layout.pieces, 1):
        raise NotImplementedError(
            f"compressed attention needs runs of consecutive tokens, {layout.pieces} a shard; "
            f"{layout} over {shards} shards has {most}; use Zigzag() or Contiguous()"
        )
    return most


def shards_of(axis_name) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and axis_name not in mesh.shape:
        raise ValueError(f"the mesh has no axis {axis_name!r}; it has {mesh.axis_names}")
    return mesh.shape.get(axis_name, 1)
