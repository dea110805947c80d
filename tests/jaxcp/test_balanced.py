# SPDX-License-Identifier: Apache-2.0
"""Packed documents dealt out fairly: tiles that kernels visit, exact inverse, the same answers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jaxcp
from jaxcp import Balanced, Contiguous, Zigzag
from jaxcp.context_parallel import Halo
from jaxcp.context_parallel.recurrent import Pieces
from jaxcp.data.sources import checked, consecutive
from jaxcp.mesh import MeshConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import TokenFiles, TrainConfig
from jaxcp.training.batches import Batches
from jaxcp.training.step import abstract_inputs
from pallas_kernels import PAD_POSITION
from pallas_kernels.flash_attention import NO_POSITION, Mask, blocks
from pallas_kernels.flash_attention.tuning import TABLE

TPU = 1024, ("mosaic_forward", "mosaic_backward")
NVIDIA = 128, ("triton_forward", "triton_dq")
SKEWED = ("log-normal", "giant first", "giant after others")


def lengths(kind, total):
    """Of the documents of a row of `total` tokens, which may end inside of the last one."""
    rng = np.random.default_rng(0)
    short = np.maximum(1, rng.lognormal(np.log(600), 0.8, total // 50)).astype(int)
    return {
        "one": [total],
        "log-normal": np.maximum(1, rng.lognormal(np.log(total / 64), 1.5, 4000)).astype(int),
        "giant first": [total * 6 // 10, *short],
        "giant after others": [*short[: total // 4000], total * 6 // 10, *short],
        "small": rng.integers(20, 200, total // 20),  # shorter than a tile of the TPU kernels
    }[kind]


def packed(kind, total):
    return np.searchsorted(np.cumsum(lengths(kind, total)), np.arange(total), side="right")


@functools.partial(jax.jit, static_argnums=(0, 1))
def visited(tile_q, tile_kv, positions, segments):
    """Tiles of each block of queries: those that `block_lists` does not leave out."""
    size = positions.shape[1]
    q = blocks.token_ids(positions, segments, size, NO_POSITION)
    kv = blocks.token_ids(positions, segments, size, PAD_POSITION)
    sides = (
        blocks.block_bounds(q, tile_q, NO_POSITION),
        blocks.block_bounds(kv, tile_kv, PAD_POSITION),
    )
    return blocks.block_lists(Mask(), *sides, True, along="kv")[1][0, :, 1]


def work(layout, segments, shards, operation):
    """Tiles a shard visits in all the steps of a ring, with the block sizes that ship.

    Blocks do not straddle shards, so one list over all shards' keys is the lists of all steps.
    """
    sizes = next(row[4] for row in TABLE if row[0] == operation and row[1] == "" and row[2] >= 128)
    order = layout.order(len(segments), shards, segments[None]).reshape(1, -1)
    arrays = (jnp.asarray(x, jnp.int32) for x in (order, segments[order]))
    return np.asarray(visited(sizes.q, sizes.kv, *arrays)).reshape(shards, -1).sum(1)


# Balance


@pytest.mark.parametrize("shards", [8, 64])
def test_one_document(shards):
    """Zigzag to 1.02 of the mean; contiguous to (2n - 1) / n, but for the diagonal."""
    segments = np.zeros(shards * 16 * 1024, int)
    zigzag, contiguous = (
        work(layout, segments, shards, "mosaic_forward") for layout in (Zigzag(), Contiguous())
    )
    assert zigzag.max() <= 1.02 * zigzag.mean()
    assert contiguous.max() >= (1.86 if shards == 8 else 1.97) * contiguous.mean()


@pytest.mark.parametrize("kind", ["one", *SKEWED, "small"])
@pytest.mark.parametrize("shards", [8, 64])
@pytest.mark.parametrize("block, operations", [TPU, NVIDIA], ids=str)
def test_packed_documents(kind, shards, block, operations):
    """1.02 of the mean or, where a tile is more than that, the next whole tile; none is added."""
    segments = packed(kind, shards * 16 * block)
    for operation in operations:
        ours = work(Balanced(block), segments, shards, operation)
        assert ours.max() <= max(1.02 * ours.mean(), np.ceil(ours.mean()))
        assert ours.sum() == work(Contiguous(), segments, shards, operation).sum()
    if kind in SKEWED:
        zigzag = work(Zigzag(), segments, shards, operations[0])
        assert zigzag.max() > 1.4 * zigzag.mean()


@pytest.mark.parametrize("each, bar", [(8, 1.05), (4, 1.27)])
def test_few_blocks_are_as_fair_as_the_docstring_says(each, bar):
    for kind in SKEWED:
        ours = work(Balanced(), packed(kind, 8 * each * 1024), 8, "mosaic_forward")
        assert ours.max() <= bar * ours.mean()


def test_smaller_blocks_than_tiles_are_more_work():
    """Why `block` is the tile, not something finer."""
    segments = packed("small", 8 * 4096)
    more, none = (work(Balanced(x), segments, 8, "mosaic_forward").sum() for x in (512, 1024))
    assert more > 2 * none


# A permutation


@given(
    length=st.integers(1, 300),
    shards=st.integers(1, 9),
    block=st.integers(1, 40),
    ends=st.lists(st.integers(0, 300), max_size=5),
)
def test_inverse_is_exact(length, shards, block, ends):
    layout = Balanced(block)
    tokens = np.arange(2 * length, dtype=np.int32).reshape(2, length)
    segments = np.searchsorted(np.sort(ends), np.arange(length), side="right").astype(np.int32)
    segments = np.stack([segments, np.zeros_like(segments)])
    tree = {"tokens": tokens, "segment_ids": segments, "deep": [tokens[..., None] * np.ones(3)]}
    there = layout.permute(tree, shards)
    order = layout.order(length, shards, segments)
    assert order.shape == (2, layout.padded_length(length, shards))
    assert order.shape[1] - length < shards and order.shape[1] % shards == 0
    # on every shard in natural order, so pads, >= length, come last
    assert (np.diff(order.reshape(2, shards, -1), axis=2) > 0).all()
    assert ((there["segment_ids"] == -1) == (order >= length)).all()
    back = layout.inverse(there, shards, length, segments)
    chex.assert_trees_all_equal(back, tree)


def test_what_it_needs():
    x = np.zeros((2, 12), np.int32)
    with pytest.raises(ValueError, match=r"there are no segment_ids: give them.*Zigzag\(\)"):
        Balanced().permute({"tokens": x}, 2)
    for ask in (lambda: Balanced().inverse(x, 2, 12), lambda: Balanced().places(12, 2)):
        with pytest.raises(ValueError, match="no segment_ids"):
            ask()
    with pytest.raises(ValueError, match=r"segment_ids must be \[B, 12\]; got \(2, 11\)"):
        Balanced().inverse(x, 2, 12, x[:, :11])
    with pytest.raises(ValueError, match="segment_ids have 2 rows, but a leaf has 1"):
        Balanced().permute({"tokens": x[:1], "segment_ids": x}, 2)
    with pytest.raises(ValueError, match="length 13 over 2 shards is 14 places; got 12"):
        Balanced().inverse(x, 2, 13, np.zeros((2, 13), int))
    with pytest.raises(ValueError, match="block must be at least 1; got block=0"):
        Balanced(block=0)
    with pytest.raises(ValueError, match="shards=0"):
        Balanced().order(4, 0, x)


# Attention and training


T, BALANCED = 45, Balanced()


def problem():
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(2, T, n, 8)).astype(np.float32) for name, n in
         zip(("q", "k", "v", "dout"), (4, 2, 2, 4), strict=True)}  # fmt: skip
    segments = (np.arange(T) >= np.array([[[30]], [[5]]])).sum(1).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    return x | {"positions": positions, "segment_ids": segments}


def test_the_answer_of_one_device(mesh_of):
    """Rows in different orders, forward and backward; the property test draws other strategies."""
    strategy, shards, options = jaxcp.AllGather(layout=BALANCED), 3, {"window": 11}
    mesh_of(seq=shards)
    x = problem()
    assert not np.array_equal(*BALANCED.order(T, shards, x["segment_ids"]))
    there = jax.device_put(BALANCED.permute(x, shards), P("data", "seq"))

    @jax.jit
    def both(x):
        def attend(q, k, v):
            return jaxcp.context_parallel_attention(
                q, k, v, x["positions"], segment_ids=x["segment_ids"], strategy=strategy, **options
            )

        out, pull = jax.vjp(attend, x["q"], x["k"], x["v"])
        return out, *pull(x["dout"])

    found = BALANCED.inverse(both(there), shards, T, x["segment_ids"])
    for ours, theirs in zip(found, dense(**x, **options), strict=False):
        limit = 2e-6 * max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=limit, rtol=0)


def test_what_must_know_the_order_refuses(mesh_of):
    mesh_of(seq=2)
    x = jnp.ones((2, 32, 2, 8))
    positions = jnp.zeros((2, 32), jnp.int32)
    refused = functools.partial(pytest.raises, ValueError, match=r"no segment_ids.*take Zigzag")
    for strategy, options in (
        (Halo(layout=Balanced()), {"window": 4}),
        (jaxcp.Ring(layout=Balanced()), {"window": 4, "consecutive": True}),
        (jaxcp.FixedOrder(layout=Balanced()), {}),
    ):
        with refused():
            jaxcp.context_parallel_attention(
                x, x, x, positions, strategy=strategy, segment_ids=positions, **options
            )
    with refused():
        jaxcp.attention_fn(jaxcp.Ring(layout=Balanced()))(x, x, x)
    pieces = jax.shard_map(
        lambda x: Pieces.of_layout(Balanced(), 32, "seq").split(x),
        in_specs=P(None, "seq"),
        out_specs=P(None, None, "seq"),
    )
    with refused():
        pieces(jax.device_put(x, P(None, "seq")))


def test_batches_of_a_run(tmp_path):
    """Documents of 40 tokens about: dealt out row by row, and windows are not cut out of K/V."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(2000) < 1 / 40, 0, rng.integers(1, 64, 2000)).astype("u1")
    tokens.tofile(tmp_path / "x.bin")
    config = TrainConfig(
        model=GPTConfig(vocab_size=64, max_positions=90, num_layers=1, num_heads=2, embed_dim=16),
        data=TokenFiles(pattern=str(tmp_path / "x.bin"), dtype="uint8", separator=0),
        seq_len=90, batch_size=2, steps=1, out_dir=tmp_path, mesh=MeshConfig(seq=4),
        strategy=jaxcp.Ring(layout=Balanced(block=8)),
    )  # fmt: skip
    mesh = config.mesh.make(jax.devices()[:4])
    batch, _, in_order = Batches(config, mesh).batch(0)
    assert {key: x.shape for key, x in abstract_inputs(config, mesh)[1].items()} == {
        key: x.shape for key, x in batch.items()
    }
    natural = checked(config.data.batch(0, 2, 90), 64)
    assert not in_order and consecutive(natural)
    there = {key: np.asarray(x)[0] for key, x in batch.items()}
    assert not np.array_equal(*there["positions"])
    back = config.strategy.layout.inverse(there, 4, 90, natural["segment_ids"])
    for key, x in natural.items():
        np.testing.assert_array_equal(back[key], x)
