# SPDX-License-Identifier: Apache-2.0
"""Sliding windows: a shard receives the keys that its windows reach, and no others.

Communication a device (letters as in `ring`): one permute of K, V and positions for each distance
between shards over which a window reaches. Under zigzag, a window of W within one piece: two
permutes (one each way) of at most `W - 1 + 2n` rows, `B K (H + V) e + 4 B` bytes each; contiguous:
one. Backward: the same rows' dK and dV the other way, in k's dtype: each row is summed from at most
three devices.

Memory, forward, beside the arguments: the rows R (twice `W - 1 + 2n`) as they leave and arrive, one
float32 partial result, and out: `2 R B K (H + V) e + 4 B t N V + B t N V e`.

Which rows those are follows from the layout alone, so tokens must lie in its order and the tokens
of a segment be consecutive. `checked` finds out (it gathers positions and segment ids) and answers
with NaN where they are not; whoever made the positions from the layout needs no check.
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcp.context_parallel.cost import Cost, Shapes, Traffic
from jaxcp.context_parallel.strategy import Strategy, expanded
from jaxcp.layout import Layout
from pallas_kernels import PAD_POSITION, flash_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halo(Strategy):
    """Sends the keys that a window reaches, from the shards that hold them; for windows only.

    The other strategies pick it for window layers where they know the order of tokens. Elsewhere it
    looks at the positions itself, and answers NaN where tokens lie otherwise than its layout says;
    `checked=False` leaves that look out.

    Raises:
      NotImplementedError: there is no window.
    """

    checked: bool = True

    def attend(
        self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, mask, expand=None, weights=(), **options,
    ):  # fmt: skip
        _check_window(mask.window)
        n, tokens = lax.axis_size(axis_name), q.shape[1]
        if kv_pos.shape[1] != tokens or self.layout.padded_length(n * tokens, n) != n * tokens:
            raise ValueError(
                f"Halo: {tokens} queries and {kv_pos.shape[1]} keys a shard are not the layout's, "
                f"{self.layout} over {n} shards; permute them, or use Ring()"
            )

        def attend(k, v, kv_pos, kv_seg, carry=None, out_dtype=None):
            return flash_attention(
                q,
                *expanded(k, v, expand, weights),
                q_positions=q_pos,
                kv_positions=kv_pos,
                q_segment_ids=q_seg,
                kv_segment_ids=kv_seg,
                causal=mask.causal,
                window=mask.window,
                carry=carry,
                out_dtype=out_dtype,
                **options,
            )

        reach = reached(self.layout, n, tokens, mask.window, mask.causal)
        keys = k, v, kv_pos, kv_seg
        halo = [fetch(keys, rows, distance, axis_name) for distance, rows in reach.items()]
        # own keys first: the halo is on its way meanwhile
        dtype = np.promote_types(q.dtype, np.float32) if halo else q.dtype
        done = attend(*keys, out_dtype=dtype)
        if halo:
            k, v, pos, seg = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *halo)
            done = attend(k, v, pos, seg, carry=done)
        if not self.checked or n == 1:
            return done
        good = _consecutive(self.layout, n, q_pos, q_seg, axis_name)[:, None, None]
        return jnp.where(good[..., None], done[0], jnp.nan), jnp.where(good, done[1], jnp.nan)

    def cost(self, shapes: Shapes) -> Cost:
        _check_window(shapes.window)
        n, kind = shapes.shards, "collective-permute"
        reach = reached(self.layout, n, shapes.tokens, shapes.window, shapes.causal)
        hops, rows = len(reach), sum(table.shape[1] for table in reach.values())
        keys = shapes.kv_bytes // shapes.keys * rows
        ids = shapes.key_ids_bytes // shapes.keys * rows
        check = Traffic("all-gather", shapes.ids, n * shapes.query_ids_bytes, n)
        return Cost(
            forward=(
                Traffic(kind, hops * (2 + shapes.ids), keys + ids, n),
                *[check] * self.checked,
            ),
            backward=(Traffic(kind, hops * 2, keys, n),),
            held=2 * keys + (shapes.partial_bytes if hops else 0) + shapes.out_bytes,
        )


def _check_window(window):
    if window is None:
        raise NotImplementedError("Halo needs a window; for full attention use Ring()")


def fetch(keys, rows, distance, axis_name):
    """K, V, positions (and whatever follows) of `rows` of the shard `distance` before this one."""
    n = len(rows)
    sent = jnp.asarray(rows)[lax.axis_index(axis_name)]
    k, v, positions, *more = jax.tree.map(
        lambda x: jnp.take(x, jnp.maximum(sent, 0), axis=1, unique_indices=False), keys
    )
    positions = jnp.where(sent < 0, PAD_POSITION, positions)
    hops = [(i, (i + distance) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, hops), (k, v, positions, *more))


@functools.lru_cache(maxsize=64)
def reached(
    layout: Layout, shards: int, tokens: int, window: int, causal: bool
) -> dict[int, np.ndarray]:
    """`rows_to_send` under a layout of `tokens` a shard, whatever pads it may have added."""
    padded = shards * tokens
    lengths = [padded - pads for pads in range(min(layout.padded_length(1, shards), padded))]
    orders = [layout.order(length, shards).reshape(shards, tokens) for length in lengths]
    return rows_to_send(zip(orders, lengths, strict=True), window, causal)


@functools.lru_cache(maxsize=64)
def full_reach(
    layout: Layout, shards: int, tokens: int, window: int
) -> dict[int, np.ndarray] | None:
    """`rows_to_send` where no place of a layout is a pad; None where that is not `worth_it`.

    It also does for fewer tokens at the same places, the last ones left out.
    """
    order = np.sort(layout.places(shards * tokens, shards), axis=1)
    return worth_it(rows_to_send([(order, shards * tokens)], window), tokens)


def worth_it(rows: dict[int, np.ndarray], tokens: int) -> dict[int, np.ndarray] | None:
    """`rows`, unless one all-gather of all `tokens` a shard sends hardly more."""
    sent = sum(table.shape[1] for table in rows.values())
    others = max((len(table) - 1 for table in rows.values()), default=0)
    return None if 2 * sent > others * tokens > 0 else rows


def rows_to_send(
    orders: Iterable[tuple[np.ndarray, int]], window: int, causal: bool = True
) -> dict[int, np.ndarray]:
    """Find the rows that each shard sends: `{distance: local rows [shards, most]}`, -1 for none.

    Enough for each of `orders`: the natural index of the token at each place `[shards, tokens]`,
    in order on a shard and pads last, and how many tokens there are; pads are not below that.
    """
    requests: dict[tuple[int, int], set] = {}
    for order, length in orders:
        shards, tokens = order.shape
        place = np.argsort(order, axis=None)  # of a natural index: shard * tokens + row
        for shard, own in enumerate(order):
            own = own[own < length]
            needed = _beyond(own, window, length, causal)
            for owner in np.unique(place[needed] // tokens):
                rows = place[needed][place[needed] // tokens == owner] % tokens
                requests.setdefault((int(owner), shard), set()).update(rows.tolist())
    tables = {}
    for distance in sorted({(to - owner) % shards for owner, to in requests}):
        rows = [sorted(requests.get((i, (i + distance) % shards), ())) for i in range(shards)]
        table = np.full((shards, max(map(len, rows))), -1, np.int32)
        for line, sent in zip(table, rows, strict=True):
            line[: len(sent)] = sent
        tables[distance] = table
    return tables


def _beyond(own, window, length, causal):
    """Natural indices that the windows of `own` (sorted) reach and that are not among them."""
    if not own.size:
        return own
    firsts = own[np.diff(own, prepend=-2) != 1].tolist()
    lasts = own[np.diff(own, append=length + 1) != 1].tolist()
    gaps = zip(firsts, [-1, *lasts[:-1]], strict=True)  # before each run: up to the run before
    spans = [(max(first - window, last) + 1, first) for first, last in gaps]
    if not causal:
        gaps = zip([*firsts[1:], length], lasts, strict=True)
        spans += [(last + 1, min(last + window, first)) for first, last in gaps]
    return np.unique(np.concatenate([np.arange(*span) for span in spans]))


def _consecutive(layout, n, positions, segments, axis_name):
    """`[B]`: do the tokens of every segment lie one after the other in the layout's order?"""
    segments = jnp.zeros_like(positions) if segments is None else segments
    positions, segments = (
        lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (positions, segments)
    )
    padded = positions.shape[1]

    def holds(pads):
        order = np.argsort(layout.order(padded - pads, n))[: padded - pads]
        p, s = jnp.take(positions, order, axis=1), jnp.take(segments, order, axis=1)
        real = p != PAD_POSITION
        both = real[:, :-1] & real[:, 1:]
        follows = (s[:, 1:] > s[:, :-1]) | ((s[:, 1:] == s[:, :-1]) & (jnp.diff(p) == 1))
        runs = real[:, 0].astype(jnp.int32) + (real[:, 1:] & ~real[:, :-1]).sum(1)
        return (follows | ~both).all(1) & (runs <= 1) & (real.sum(1) == tokens)

    tokens = (positions != PAD_POSITION).sum(1)
    return jnp.stack([holds(p) for p in range(min(layout.padded_length(1, n), padded))]).any(0)
