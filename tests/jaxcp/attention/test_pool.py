# SPDX-License-Identifier: Apache-2.0
"""Sequences that share a pool of pages: each has the logits that it has alone."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but

import jaxcp
from jaxcp.attention.pool import OverPool, empty_pool
from pallas_kernels import PAD_POSITION

PAGE, PAGES_OF_A_ROW, PIECE = 4, 24, 33
LENGTHS = (70, 5, 41, 62)
CLOSE = {"atol": 3e-5, "rtol": 0}
FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures"
MODELS = {
    "full": "qwen3-moe-tiny",
    "windows, sinks": "gpt-oss-tiny",
    "latents": "deepseek-v3-tiny",
    "selected latents": "deepseek-v32-tiny",
    "blocks": "deepseek-v4-tiny",
}
MESHES = {"one device": {}, "seq 3": {"seq": 3}, "data 2, seq 4": {"data": 2, "seq": 4}}


class Sequences:
    """Rows of one model in a pool, with pages in any order."""

    def __init__(self, model, axes):
        self.model, self.data, self.shards = model, axes.get("data", 1), axes.get("seq", 1)
        rng = np.random.default_rng(3)
        self.rows = len(LENGTHS) // self.data
        listed = -(-PAGES_OF_A_ROW // self.shards)
        self.pages = np.concatenate(
            [
                np.concatenate(
                    [
                        rng.permutation(self.rows * listed).reshape(self.rows, listed)
                        for _ in range(self.shards)
                    ],
                    axis=1,
                )
                for _ in range(self.data)
            ]
        ).astype(np.int32)
        self.states = np.concatenate([rng.permutation(self.rows) for _ in range(self.data)])
        self.before = np.zeros(len(LENGTHS), np.int32)
        makers = {
            name: functools.partial(attention.empty, layers=count)
            for name, (attention, count) in model.attentions().items()
        }
        self.pool = empty_pool(
            makers, pages=self.rows * listed, page=PAGE, states=self.rows, dtype=jnp.float32
        )

    def shard_of(self, position):
        return position // PAGE % self.shards

    def prefill(self, rows, count, text):
        """`count` more tokens of `rows`, one of each group of devices; logits after them."""
        starts = self.before[rows]
        spread = [
            [[p for p in range(s, s + count) if self.shard_of(p) == r] for r in range(self.shards)]
            for s in starts
        ]
        width = (PIECE // PAGE // self.shards + 2) * PAGE  # one program for all pieces
        positions = np.full((len(rows), self.shards, width), PAD_POSITION, np.int32)
        for b, row in enumerate(spread):
            for r, mine in enumerate(row):
                positions[b, r, : len(mine)] = mine
        positions = positions.reshape(len(rows), -1)
        real = positions != PAD_POSITION
        ids = np.where(real, text[rows][np.arange(len(rows))[:, None], positions * real], 0)
        return self._run(rows, ids, positions, np.full(len(rows), count), sharded=True)

    def decode(self, tokens, active):
        """One token of each active row, or several; logits after them."""
        tokens = np.asarray(tokens).reshape(len(LENGTHS), -1)
        count = np.where(active, tokens.shape[1], 0)
        positions = self.before[:, None] + np.arange(tokens.shape[1])
        positions = np.where(np.asarray(active)[:, None], positions, PAD_POSITION)
        return self._run(np.arange(len(LENGTHS)), tokens, positions, count, sharded=False)

    def _run(self, rows, ids, positions, count, *, sharded):
        states = np.where(count > 0, self.states[rows], len(LENGTHS))
        spec = jax.P("data", "seq" if sharded else None)
        arrays = ids, positions, self.before[rows], count, self.pages[rows], states
        arrays = [np.asarray(x, np.int32) for x in arrays]
        if not jax.sharding.get_abstract_mesh().empty:
            specs = spec, spec, jax.P("data"), jax.P("data"), jax.P("data"), jax.P("data")
            arrays = [jax.device_put(x, s) for x, s in zip(arrays, specs, strict=True)]
        last = self.before[rows] + count - 1
        logits, self.pool = step(self.model, self.pool, *arrays, last, sharded)
        self.before[rows] += count.astype(np.int32)
        return np.asarray(logits)


@functools.partial(jax.jit, static_argnums=9, donate_argnums=1)
def step(model, pool, ids, positions, before, added, pages, states, last, sharded):
    attend = OverPool(pool, positions, before, added, pages=pages, states=states, sharded=sharded)
    hidden, _ = model.forward(ids, positions, attend)
    here = (positions == last[:, None]).astype(hidden.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    spec = None if mesh.empty else jax.P("data", None)
    row = jnp.einsum("bt,btd->bd", here, hidden, out_sharding=spec)
    return model.logits(row[:, None])[:, 0], attend.pool_after


@functools.cache
def alone(name):
    """Sequences, and the logits after each token of theirs, of one pass on one device."""
    model, _ = jaxcp.load(FIXTURES / MODELS[name])
    text = np.random.default_rng(0).integers(0, model.config.vocab_size, (len(LENGTHS), 80))
    return text, np.asarray(jaxcp.logits(model, text))


@pytest.mark.parametrize(
    ("name", "mesh"),
    slow_but(
        [
            *itertools.product(["windows, sinks"], MESHES),
            *itertools.product(["full", "latents", "selected latents"], ["data 2, seq 4"]),
            ("latents", "one device"),
            ("selected latents", "seq 3"),
            *itertools.product(["blocks"], MESHES),
        ],
        lambda case: case == ("windows, sinks", "seq 3"),
    ),
)
def test_sequences_in_a_pool_have_the_logits_that_they_have_alone(name, mesh, mesh_of):
    """In pieces, then token by token and five at once, with rows that rest."""
    axes = MESHES[mesh]
    text, whole = alone(name)
    if axes:
        mesh_of(**axes)
    model, _ = jaxcp.load(FIXTURES / MODELS[name])
    sequences = Sequences(model, axes)
    for b in range(sequences.rows):
        rows = np.arange(b, len(LENGTHS), sequences.rows)
        left = min(LENGTHS[row] for row in rows)  # groups of devices do as much at a time
        while left:
            count = min(left, PIECE)
            logits = sequences.prefill(rows, count, text)
            left -= count
            after = whole[rows, sequences.before[rows] - 1]
            np.testing.assert_allclose(logits, after, **CLOSE)
    for width, active in ((1, [1, 1, 1, 1]), (1, [1, 0, 1, 1]), (5, [0, 1, 1, 0]), (1, [1] * 4)):
        active, before = np.asarray(active, bool), sequences.before.copy()
        at = np.arange(len(LENGTHS))[:, None], before[:, None] + np.arange(width)
        logits = sequences.decode(text[at], active)
        after = whole[np.arange(len(LENGTHS)), before + width - 1]
        np.testing.assert_allclose(logits[active], after[active], **CLOSE)


def test_what_compressed_blocks_take(mesh_of):
    """Entries and index keys are divided over shards, windows and pending parts are on each."""
    mesh_of(seq=4)
    model, _ = jaxcp.load(FIXTURES / MODELS["blocks"])  # layers W, H, C, H, C
    pool = model.init_pool(pages=6, page=32, states=3)
    heavy, sparse = 6 * 32 // 8 * 32, 6 * 32 // 4 * (32 + 16)  # channels of 6 pages
    window = 3 * 7 * 32
    parts = [3 * (1 + 1 + 2 * 32), 3 * sum(2 + 2 * 2 + 2 * 2 * 2 * size for size in (32, 16))]
    channels = 2 * (heavy + sparse) + 5 * window + 2 * sum(parts)
    assert pool.keeps_state and pool.bytes_per_device() == 4 * channels
