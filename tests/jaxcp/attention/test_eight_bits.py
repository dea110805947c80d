# SPDX-License-Identifier: Apache-2.0
"""Pages in 8 bits: how far logits move, what they take, and what cannot have them."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import jaxcp
from benchmarks.cache_formats import bytes_a_token, errors, pool_logits
from jaxcp.attention.places import PagedSlots
from jaxcp.context_parallel.shards import on_shards
from jaxcp.inference.request import Status
from jaxcp.inference.sampling import Sampling
from pallas_kernels import PAD_POSITION

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures"
FULL = "qwen3-moe-tiny"
FORMATS = ("int8", "float8_e4m3fn")


def load(name):
    return jaxcp.load(FIXTURES / name)[0]


@pytest.mark.parametrize(
    ("cache_dtype", "most"), [(None, 2e-6), ("int8", 0.03), ("float8_e4m3fn", 0.06)]
)
def test_logits_are_near_those_of_transformers(cache_dtype, most):
    """Bound the error of the median token, for now and then a router chooses another expert.

    Scales that are wrong by a fiftieth give 0.11 and 0.12; those of another head or token, 0.5.
    """
    reference = np.load(FIXTURES / FULL / "reference.npz")
    logits = pool_logits(load(FULL), reference["input_ids"][0], cache_dtype)
    error = errors(reference["logits"][0], logits)
    assert np.median(error) <= most
    assert cache_dtype is None or np.median(error) > 1e-3  # 8 bits indeed


@pytest.mark.parametrize("shards", [1, 3])
def test_scales_lie_where_their_tokens_do(shards, mesh_of):
    """Write rows that begin inside pages, rest, or list pages of others behind their own."""
    rng, page, count = np.random.default_rng(0), 4, 3
    starts, added = np.asarray([6, 0, 17, 3]), np.asarray([7, 0, 3, 1])
    tables = [rng.permutation(4 * count).reshape(4, count) for _ in range(shards)]
    pages = np.concatenate(tables, axis=1).astype(np.int32)
    if shards == 1:
        starts = starts % 5
        pages[3, 1:] = pages[0, 0]  # no pages of row 3, which has 4 tokens
    positions = starts[:, None] + rng.permutation(7)
    real = positions < (starts + added)[:, None]
    positions = np.where(real, positions, PAD_POSITION).astype(np.int32)
    new = rng.normal(size=(4, 7, 2)).astype(np.float32)
    before = rng.normal(size=(2, 4 * count * shards, 2, page)).astype(np.float32)
    if shards > 1:
        mesh_of(seq=shards)

    def local(stack, place):
        return place.write(stack, 1, new, slots_last=True)

    place = PagedSlots(positions, pages, None, page=page, sharded=False)
    stack = jax.P(*PagedSlots.stack[:2])
    written = jax.jit(on_shards(local, (stack, place.specs), stack))(before, place)
    wanted = before.copy()
    for row, token in zip(*np.nonzero(real), strict=True):
        nth, slot = divmod(positions[row, token], page)
        number = pages[row, nth % shards * count + nth // shards]
        wanted[1, nth % shards * 4 * count + number, :, slot] = new[row, token]
    np.testing.assert_array_equal(written, wanted)


@pytest.mark.parametrize("cache_dtype", FORMATS)
def test_as_many_bytes_hold_nearly_twice_the_tokens_of_bfloat16(cache_dtype, mesh_of):
    """At a head dim of 128: 256 bytes a head and token become 128 and those of a scale."""
    config = jaxcp.load_config(FIXTURES / FULL)
    config = dataclasses.replace(config, head_dim=128, dtype="bfloat16")
    model = jaxcp.abstract_model(config)
    assert bytes_a_token(model, None) == 3 * 2 * 2 * 256
    mesh_of(seq=2, model=2)
    sizes = [
        model.init_pool(pages=4, page=32, states=0, cache_dtype=dtype).bytes_per_device()
        for dtype in (None, cache_dtype)
    ]
    assert sizes == [4 * 32 * 3 * 2 * 256, 4 * 32 * 3 * 2 * (128 + 4)]
    assert sizes[0] / sizes[1] > 1.9


def windows_alone():
    config = jaxcp.HybridMoEConfig(
        vocab_size=64, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
        mlp_dim=16, moe_dim=8, num_experts=4, num_experts_per_tok=2, layer_pattern="LL", window=9,
    )  # fmt: skip
    return jaxcp.HybridMoE(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("model", "cache_dtype", "error", "words"),
    [
        (lambda: load("deepseek-v3-tiny"), "int8", NotImplementedError, "latents have no form"),
        (lambda: load("deepseek-v4-tiny"), "int8", NotImplementedError, "compressed blocks have"),
        (windows_alone, "int8", ValueError, "no layer of this model keeps pages"),
        (lambda: load(FULL), "int4", ValueError, "one of .*int8.*got 'int4'"),
        (lambda: load(FULL), np.int8, ValueError, "one of .*int8.*got <class"),
    ],
)
def test_who_cannot_have_8_bits_is_told_when_the_engine_is_made(model, cache_dtype, error, words):
    with pytest.raises(error, match=words):
        jaxcp.Engine(model(), None, max_len=64, cache_dtype=cache_dtype)


def test_a_session_keeps_8_bits_as_requests_do():
    engine = jaxcp.Engine(load(FULL), None, max_len=64, stop_tokens=(), cache_dtype="int8")
    ids = list(range(20))
    (result,) = engine.generate([ids], Sampling(max_new_tokens=4))
    assert list(engine.session().send(ids, max_new_tokens=4)) == result.tokens


@pytest.mark.parametrize("cache_dtype", FORMATS)
def test_keys_that_are_not_finite_fail_their_request_alone(cache_dtype):
    """8 bits could not say so: the scale does."""
    model = load(FULL)
    model.embed[...] = model.embed[...].at[7].set(np.nan)
    engine = jaxcp.Engine(
        model, None, max_len=64, max_rows=2, pool_tokens=96, stop_tokens=(),
        cache_dtype=cache_dtype,
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(8, 256, (2, 30)).tolist()
    (wanted,) = engine.generate(ids[:1], Sampling(max_new_tokens=4))
    good = engine.add(ids[0], Sampling(max_new_tokens=4))
    bad = engine.add([*ids[1], 7, 9], Sampling(max_new_tokens=4))
    while not (good.done and bad.done):
        engine.step()
    assert bad.status is Status.FAILED and bad.answer == [] and "not finite" in str(bad.error)
    assert good.answer == wanted.tokens
