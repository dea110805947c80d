# SPDX-License-Identifier: Apache-2.0
"""Attention over the cache, from the definition: over any number of turns and shards."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense
from flax import nnx

import jaxcp
from jaxcp import Contiguous, GPTConfig, Ring, Striped, Zigzag
from jaxcp.attention.full import Full
from jaxcp.attention.over_cache import OverCache
from jaxcp.attention.window import Window
from jaxcp.compile import compile_for, decode_program, prefill_program
from jaxcp.inference import turns
from jaxcp.models.base import LanguageModel, embed
from jaxcp.sharding import tokens_spec
from jaxcp.weights.placement import place
from pallas_kernels import PAD_POSITION

VOCAB, HEADS, KV_HEADS, HEAD_DIM = 128, 4, 2, 8
SINKS = (-np.inf, 0.0, 1.0, 2.0)  # the first head has none
CLOSE = {"atol": 2e-5, "rtol": 0}
LENGTHS = (1, 5, 70, 129, 500)


class Keeps(NamedTuple):
    """A layer that keeps a window; None: everything."""

    window: int | None

    def empty(self, room, *, layers):
        size = {"layers": layers, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
        if self.window is None:
            return Full.empty(room, **size)
        return Window.empty(room, window=self.window, **size)


class Attending(LanguageModel):
    """Attention and nothing else: `x = x + attend(q, k, v)` a layer; `options` of each.

    The last layer should be a full one: each row of those before it then shows in the last row's
    "logits", which are x.
    """

    def __init__(self, *options):
        self.options = tuple(tuple(x.items()) for x in options)
        size = {"num_layers": len(self.options), "num_heads": HEADS, "embed_dim": HEADS * HEAD_DIM}
        self.config = GPTConfig(vocab_size=VOCAB, max_positions=10_000, **size)
        rng = np.random.default_rng(0)
        self.table = nnx.Param(rng.normal(size=(VOCAB, HEADS * HEAD_DIM)).astype(np.float32))
        shape = len(self.options), HEADS * HEAD_DIM, HEADS + 2 * KV_HEADS, HEAD_DIM
        self.weights = nnx.Param(rng.normal(size=shape, scale=0.2).astype(np.float32))

    def attentions(self):
        return {str(i): (Keeps(dict(x)["window"]), 1) for i, x in enumerate(self.options)}

    def forward(self, tokens, positions, attend):
        x, spec = embed(self.table[...], tokens, jnp.float32), tokens_spec(tokens)
        spec = None if spec is None else type(spec)(*spec, None)
        eye = jnp.eye(HEADS * HEAD_DIM).reshape(HEADS, HEAD_DIM, -1)
        for layer, options in enumerate(self.options):
            q, k, v = heads(jnp.einsum("btd,dnh->btnh", x, self.weights[layer]))
            options = dict(options)
            if "sinks" in options:
                options["sinks"] = jnp.asarray(options["sinks"])
            here = attend.of(attend.kept(str(layer)), 0)
            out = here(q, k, v, **options)
            attend.keep(str(layer), here.state)
            x += jnp.einsum("btnh,nhd->btd", out, eye, out_sharding=spec)
        return x, None

    def head_kernel(self):
        return jnp.eye(HEADS * HEAD_DIM)

    def expected(self, tokens):
        """What `forward` gives for `tokens [B, T]`, in float64."""
        x, weights = (np.asarray(y[...], np.float64) for y in (self.table, self.weights))
        x = x[tokens]
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        for layer, options in enumerate(self.options):
            q, k, v = heads(np.einsum("btd,dnh->btnh", x, weights[layer]))
            x = x + dense(q, k, v, positions, **dict(options)).reshape(x.shape)
        return x


def heads(qkv):
    return qkv[:, :, :HEADS], qkv[:, :, HEADS:-KV_HEADS], qkv[:, :, -KV_HEADS:]


def talk(model, tokens, turns, **options):
    """Yield `(ends [B], logits [B, V], cache)` after each turn: lengths `[B]`, or one for all.

    A turn of 1 is a step of decoding.
    """
    rows = np.arange(len(tokens))
    cache, ends = model.init_cache(len(tokens), tokens.shape[1] + 10), np.zeros(len(tokens), int)
    for turn in turns:
        lengths = np.broadcast_to(turn, rows.shape)
        where = ends[:, None] + np.arange(lengths.max())
        block = tokens[rows[:, None], np.minimum(where, tokens.shape[1] - 1)]
        if turn == 1:
            logits, cache = jaxcp.decode_step(model, cache, block[:, 0])
        else:
            logits, cache = jaxcp.prefill(model, cache, block, lengths=lengths, **options)
        ends = ends + lengths
        yield ends, logits, cache


def ids(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def check(model, tokens, turns, **options):
    """Every turn's logits are those of the whole sequence; the caches."""
    expected, caches = model.expected(tokens), []
    for ends, logits, cache in talk(place(model), tokens, turns, **options):
        wanted = expected[np.arange(len(tokens)), ends - 1]
        np.testing.assert_allclose(logits, wanted, **CLOSE, err_msg=f"to {ends}")
        caches.append(cache)
    return caches


# As the whole sequence at once


OPTIONS = {"scale": 0.7, "soft_cap": 1.5, "sinks": SINKS}


def test_one_device():
    """With what a layer may ask for: sinks, a scale, a soft cap, a window."""
    model = Attending({"window": 20, **OPTIONS}, {"window": None, **OPTIONS})
    check(model, ids(1, 150), [80, 70])
    tokens = ids(1, 50)
    np.testing.assert_allclose(jaxcp.logits(model, tokens), model.expected(tokens), **CLOSE)


def test_uneven_rows_options_and_forks(mesh_of):
    """A first turn so short that it is gathered, one whose window travels, short turns."""
    mesh_of(seq=3, model=2)
    model = Attending({"window": 5, **OPTIONS}, {"window": None, **OPTIONS})
    tokens = ids(2, 110)
    caches = check(model, tokens, [[7, 9], [80, 2], [20, 9], 1], donate=False)
    # from the first turn on, another way
    other = np.where(np.arange(110) < 9, tokens, ids(2, 110, seed=2))
    lengths, rows = np.array([7, 9]), np.arange(2)
    block = other[rows[:, None], lengths[:, None] + np.arange(80)]
    logits, _ = jaxcp.prefill(place(model), caches[0], block, lengths=[80, 66], donate=False)
    wanted = model.expected(np.where(np.arange(110) < lengths[:, None], tokens, other))
    np.testing.assert_allclose(logits, wanted[rows, [86, 74]], **CLOSE)


def test_eight_shards(mesh_of):
    mesh_of(seq=8)
    check(Attending({"window": 5}, {"window": None}), ids(1, 270), [200, 70])


def test_a_layer_must_do_what_its_cache_was_made_for():
    model = Attending({"window": 5})
    cache = model.init_cache(1, 20)
    with pytest.raises(ValueError, match=r"the layer keeps a window of 5; it attends with 6"):
        model.options = ((("window", 6),),)
        jaxcp.prefill(model, cache, ids(1, 4))
    with pytest.raises(ValueError, match="at most 64 tokens are not sharded; got 65"):
        OverCache(cache, jnp.zeros((1, 65), jnp.int32), jnp.full(1, 65), sharded=False)


# Where tokens go


@pytest.mark.parametrize("layout", [Zigzag(), Contiguous(), Striped()], ids=repr)
@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_tokens_are_spread_evenly_and_windows_arrive(shards, layout):
    rng = np.random.default_rng(shards)
    for start, length in itertools.product((0, 1000 + int(rng.integers(shards))), LENGTHS):
        frame = turns.Frame(shards=shards, slots=1000, windows=(None, 1, 4, 33, 33))
        tokens, done = rng.integers(0, 99, (1, length)), np.zeros(1, int)
        for piece in turns.pieces(frame, [start], [length], layout, sizes=(0,)):
            spread_tokens, spread_positions = piece.laid_out(tokens, done, np.full(1, start))
            first, count = start + done[0], piece.taken[0]
            fill, counts = (
                turns.slots_in_use(first, np.arange(shards), shards),
                (spread_positions != PAD_POSITION).reshape(shards, -1).sum(1),
            )
            lies = spread_positions.reshape(shards, -1)
            real = lies != PAD_POSITION
            assert counts.sum() == count and np.ptp(fill + counts) <= 1
            assert (np.diff(lies, axis=1) >= 0).all()  # in order, pads last
            order = np.argsort(spread_positions[0])[:count]
            assert (spread_positions[0, order] == first + np.arange(count)).all()
            assert (spread_tokens[0, order] == tokens[0, done[0] : done[0] + count]).all()
            assert piece.halos.keys() == {1, 4, 33}
            for window, halo in piece.halos.items():
                if halo is not None:
                    _arrives(lies, real, window, halo, first)
            done = done + count
        assert done == length
        if isinstance(layout, Zigzag) and length == 500 and start == 0:
            assert sum(rows.shape[1] for rows in piece.halos[4].values()) <= 2 * 3
            work = np.where(real, lies + 1, 0).sum(1)
            assert work.max() < 1.02 * work.mean()


def _arrives(lies, real, window, halo, first):
    """Each shard has, or is sent, all that the windows of its tokens reach among the new ones."""
    shards = len(lies)
    for shard in range(shards):
        there = set(lies[shard])
        for distance, rows in halo.items():
            owner = (shard - distance) % shards
            there |= set(lies[owner][rows[owner][rows[owner] >= 0]])
        for position in lies[shard][real[shard]]:
            assert there.issuperset(range(max(first, position - window + 1), position))


# What travels, on the compiled program


WINDOW, ROW = 32, 2 * KV_HEADS * HEAD_DIM * 4  # bytes of K and V of a token
HALO = 2 * (WINDOW - 1) * (ROW + 4)  # one way and the other, with positions
KEPT = (WINDOW - 1 + 64) * ROW
LAST = HEADS * HEAD_DIM * 4  # the hidden state that gives the logits


def sent(program, model, **options):
    mesh = jaxcp.make_mesh(seq=4, devices=jax.devices()[:4])
    report = compile_for(*program(model, mesh, **options), mesh)
    return {c.kind: (c.count, c.bytes) for c in report.collectives}


def test_a_window_layer_sends_its_window_and_a_long_cache_stays():
    """512 tokens on 8,192: neither the layer with a window nor the full one rotates its cache."""
    model = Attending({"window": WINDOW}, {"window": None})
    queries, partial = 128 * HEADS * HEAD_DIM * 4, 128 * HEADS * (HEAD_DIM + 1) * 4
    assert sent(prefill_program, model, tokens=512, held=8192) == {
        "collective-permute": (2 * 3, HALO),
        "all-reduce": (1, KEPT + LAST),
        "all-gather": (2, 4 * (queries + 128 * 4)),
        "all-to-all": (1, 4 * partial),
    }


def test_an_empty_cache_is_filled_by_a_ring_and_windows():
    model = Attending({"window": WINDOW}, {"window": None})
    assert sent(prefill_program, model, tokens=512) == {
        "collective-permute": (2 * 3 + 3 * 3, HALO + 3 * 128 * (ROW + 4)),
        "all-reduce": (1, KEPT + LAST),
    }


def test_a_strategy_that_is_named_is_taken():
    model = Attending({"window": None})
    found = sent(prefill_program, model, tokens=512, held=8192, strategy=Ring())
    slots = (8192 + 512) // 4 + 64
    assert found == {"collective-permute": (3 * 3, 3 * slots * (ROW + 4)), "all-reduce": (1, LAST)}


def test_decoding_sends_nothing_for_a_window():
    model = Attending({"window": WINDOW}, {"window": None})
    partial = HEADS * (HEAD_DIM + 1) * 4
    assert sent(decode_program, model, max_len=8192) == {"all-gather": (1, 4 * partial)}


def test_bytes_of_a_window_layer(mesh_of):
    mesh_of(seq=4)
    cache = Attending({"window": WINDOW}, {"window": None}).init_cache(1, 8192)
    assert cache.bytes_per_device() == KEPT + (2048 + 64) * ROW
