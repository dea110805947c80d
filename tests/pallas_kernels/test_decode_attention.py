# SPDX-License-Identifier: Apache-2.0
"""Every implementation of decode attention, against float64 and against its own promises."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but

from pallas_kernels import PAD_POSITION, decode_attention, quantize_cache
from pallas_kernels.decode_attention.api import IMPLEMENTATIONS
from pallas_kernels.testing.decode_attention import CASES, Case, arrays, check, expected, rms

LAYERED = {
    "one row": Case(slots=160, heads=4, kv_heads=2, head_dim=128),
    "rows, window": Case(batch=3, queries=2, head_dim=128, window=150, layout="shuffled"),
    "int8, window": Case(
        batch=2, queries=3, heads=8, kv_heads=4, head_dim=128, cache="int8", layout="pads",
        window=120,
    ),
    "float8, copied": Case(
        batch=2, slots=40, heads=4, kv_heads=2, head_dim=80, cache="float8_e4m3fn", sinks=True
    ),
}  # fmt: skip
"""Cases of a stack: what every backend reads where it lies, and what the kernels slice first."""
LAYERS = 3

SKIPPING = ("xla", "triton", "mosaic_tpu")


TELLING = ("eight KV heads, int8", "no block divides", "nothing to see", "everything")
TELLING += ("pages", "pages of a stack, int8")
"""Cases of `make test`: each option is in one of them."""


@pytest.mark.parametrize(
    "name, implementation",
    slow_but(
        itertools.product(CASES, IMPLEMENTATIONS),
        lambda case: case[0] in TELLING,
    ),
)
def test_matches_float64_and_repeats(name, implementation):
    check(implementation, CASES[name])


@pytest.mark.parametrize(
    ("dtype", "outliers", "cost"),
    [
        # measured: 0.009, 0.036, 0.137, 0.029
        ("int8", False, 0.012),
        ("float8_e4m3fn", False, 0.045),
        ("int8", True, 0.18),
        ("float8_e4m3fn", True, 0.04),
    ],
)
def test_what_a_quantized_cache_costs(dtype, outliers, cost):
    """Root mean square error of `out` against the cache before, as a part of out's own.

    Outliers: one entry of each token's head is thirty times the rest, and is left out of the sum.
    """
    case = Case(batch=2, queries=4, slots=1024, head_dim=128, outliers=outliers, cache=dtype)
    before = expected(dataclasses.replace(case, cache=None))["out"][..., 1:]
    assert rms(expected(case)["out"][..., 1:] - before) <= cost * rms(before)


@pytest.mark.parametrize(
    ("dtype", "share", "least"),
    [("int8", 0, 1 / 254), ("float8_e4m3fn", 1 / 16, 1 / 458752)],
)
def test_quantized_entries_are_as_near_as_promised(dtype, share, least):
    x = np.random.default_rng(0).standard_normal((3, 50, 2, 64)).astype(np.float32)
    x[..., 3] *= 100
    x[0, 0] = 0
    values, scales = quantize_cache(jnp.asarray(x), dtype)
    assert values.dtype == jnp.dtype(dtype) and scales.shape == (3, 2, 50)
    scales = np.asarray(scales, np.float64).swapaxes(1, 2)[..., None]
    stored = np.asarray(values).astype(np.float64) * scales
    greatest = np.abs(x).max(-1, keepdims=True)
    bound = np.maximum(share * np.abs(x), least * greatest)
    assert (np.abs(stored - x) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("implementation", SKIPPING)
def test_blocks_with_nothing_to_see_are_not_read(implementation):
    """NaN in the slots of whole blocks that no query sees reaches no result."""
    slots = 4096 if implementation == "xla" else 1024
    positions = jnp.arange(slots, dtype=jnp.int32)[None]
    positions = positions.at[:, : slots // 4].set(PAD_POSITION)
    hidden = (positions == PAD_POSITION) | (positions < slots // 2)
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, size, 1, 32)), jnp.float32)
        for size in (1, slots, slots)
    )

    @jax.jit
    def run(k, v):
        return decode_attention(
            q, k, v, q_positions=jnp.full((1, 1), slots - 1, jnp.int32), kv_positions=positions,
            window=slots // 2, implementation=implementation,
        )  # fmt: skip

    poisoned = run(*(jnp.where(hidden[..., None, None], jnp.nan, x) for x in (k, v)))
    for a, b in zip(run(k, v), poisoned, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "implementation"),
    slow_but(
        itertools.product(LAYERED, IMPLEMENTATIONS),
        lambda case: case[1] not in ("triton", "mosaic_tpu"),
    ),
)
def test_a_layer_of_a_stack_is_bitwise_the_layer_alone(name, implementation):
    """With the layer traced, a scan's and a number; no two layers are alike."""
    case = LAYERED[name]
    given = [arrays(dataclasses.replace(case, seed=seed)) for seed in range(LAYERS)]
    names = [key for key in given[0] if key in ("k", "v", "k_scale", "v_scale")]
    stack = {key: jnp.asarray(np.stack([x[key] for x in given])) for key in names}
    rest = {key: jnp.asarray(x) for key, x in given[0].items() if key not in names}
    attend = functools.partial(
        decode_attention, **rest, window=case.window, implementation=implementation
    )

    def by_index(layer, stack):
        return attend(**stack, layer=layer)

    def by_slice(layer, stack):
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        return attend(**jax.tree.map(take, stack))

    def results(read):
        traced = jax.jit(read)
        every = [traced(layer, stack) for layer in range(LAYERS)]
        scanned = jax.lax.map(functools.partial(read, stack=stack), jnp.arange(LAYERS))
        number = jax.jit(read, static_argnums=0)(LAYERS - 1, stack)
        return jax.tree.map(np.asarray, (every, scanned, number))

    got, expected_results = results(by_index), results(by_slice)
    jax.tree.map(np.testing.assert_array_equal, got, expected_results)
    assert len({out.tobytes() for out, _ in got[0]}) == LAYERS


def test_a_traced_layer_beyond_the_stack_is_the_nearest():
    case = Case(slots=40, head_dim=32)
    stack = {key: jnp.stack([x, 2 * x]) for key, x in arrays(case).items() if key in ("k", "v")}
    rest = {key: x for key, x in arrays(case).items() if key not in stack}
    attend = jax.jit(lambda layer: decode_attention(**rest, **stack, layer=layer))
    for layer, nearest in ((-1, 0), (7, 1)):
        jax.tree.map(np.testing.assert_array_equal, attend(layer), attend(nearest))


def test_values_and_scales_come_in_as_many_pages():
    q, pool = jnp.zeros((1, 1, 2, 32)), jnp.zeros((4, 16, 2, 32))
    now, pages = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 2), jnp.int32)
    options = {"q_positions": now, "pages": pages}
    with pytest.raises(ValueError, match="as many pages of one size"):
        decode_attention(q, pool, pool[:3], **options)
    values, scale = quantize_cache(pool, "int8")
    with pytest.raises(ValueError, match="as many pages of one size"):
        decode_attention(q, values, values, k_scale=scale, v_scale=scale[:3], **options)
    with pytest.raises(ValueError, match=r"kv_positions must be int32 \(1, 32\)"):
        decode_attention(q, pool, pool, kv_positions=jnp.zeros((1, 16), jnp.int32), **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sequences_share_pages_and_numbers_beyond_the_pool_read_no_other_memory(implementation):
    case = Case(slots=256, kv_heads=1, heads=2, head_dim=32)
    given = arrays(case)
    attend = jax.jit(functools.partial(decode_attention, implementation=implementation))
    out, lse = attend(**given)
    pool = {name: np.reshape(given[name], (2, 128, 1, 32)) for name in ("k", "v")}
    rest = {
        name: np.tile(x, (3, *[1] * (x.ndim - 1))) for name, x in given.items() if name not in pool
    }
    pages = jnp.array([[0, 1], [-7, 1], [0, 99]], jnp.int32)
    many, many_lse = attend(**pool, **rest, pages=pages)
    for row in range(3):
        np.testing.assert_allclose(np.asarray(many)[row], np.asarray(out)[0], atol=1e-6, rtol=0)
        np.testing.assert_allclose(np.asarray(many_lse)[row], np.asarray(lse)[0], atol=1e-6, rtol=0)


def attend(*, q=(1, 1, 2, 32), kv=(1, 40, 2, 32), dtype="float32", cache=None, **options):
    """Shapes alone: what is refused is refused before anything runs."""
    q_positions = jax.ShapeDtypeStruct(q[:2], jnp.int32)
    k = jax.ShapeDtypeStruct(kv, cache or dtype)
    q = jax.ShapeDtypeStruct(q, dtype)
    scale = jax.ShapeDtypeStruct((*kv[:-3], kv[-2], kv[-3]), jnp.float32)
    options = {name: scale if x == "scale" else x for name, x in options.items()}
    if "pages" in options:
        options["pages"] = jax.ShapeDtypeStruct(options["pages"], jnp.int32)
    arrays = {name: x for name, x in options.items() if name.endswith("scale") or name == "pages"}
    static = {name: x for name, x in options.items() if name not in arrays}
    call = functools.partial(decode_attention, **static)
    return jax.eval_shape(call, q, k, k, q_positions=q_positions, **arrays)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(q=(1, 17, 2, 32)), "1 to 16 queries.*17.*flash_attention"),
        (dict(q=(1, 1, 3, 32)), "multiple"),
        (dict(cache="int8"), "both k_scale and v_scale"),
        (dict(k_scale="scale"), "both k_scale and v_scale"),
        (dict(cache="int32"), "int8.*int32"),
        (dict(kv=(2, 40, 2, 32)), "agree in B"),
        (dict(soft_cap=-1.0), "soft_cap"),
        (dict(window=0), "window"),
        (dict(layer=1), r"with layer.*\[L, \.\.\.\].*a layer and \[\(1, 40, 2, 32\)"),
        (dict(kv=(3, 1, 40, 2, 32)), r"with layer.*no layer and \[\(3, 1, 40, 2, 32\)"),
        (dict(kv=(3, 1, 40, 2, 32), layer=3), "below L.*layer=3"),
        (dict(kv=(3, 1, 40, 2, 32), layer=-1), "below L.*layer=-1"),
        (dict(kv=(3, 1, 40, 2, 32), layer=1.0), "one integer.*float32 1.0"),
        (dict(kv=(3, 2, 40, 2, 32), layer=1), "agree in B"),
        (dict(pages=(2, 3)), r"pages must be int32 \[B, .*B=1; got int32 \(2, 3\)"),
        (dict(pages=(3,)), r"pages must be int32 \[B, .*\(3,\)"),
        (dict(kv=(3, 40, 2, 32), pages=(1, 3), layer=1), "a layer and"),
        (dict(kv=(3, 1, 40, 2, 32), pages=(1, 3)), "no layer and"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attend(**options)


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
def test_what_a_kernel_cannot_do_names_who_can(implementation):
    with pytest.raises(NotImplementedError, match="xla"):
        attend(q=(1, 1, 2, 512), kv=(1, 40, 2, 512), implementation=implementation)
    with pytest.raises(NotImplementedError, match=r"float16.*xla"):
        attend(dtype="float16", implementation=implementation)


def test_what_one_kernel_cannot_do_names_who_can():
    with pytest.raises(NotImplementedError, match=r"divides 128; got 3.*xla"):
        attend(q=(1, 1, 3, 32), kv=(1, 40, 3, 32), implementation="mosaic_tpu")
    scales = dict(k_scale="scale", v_scale="scale")
    with pytest.raises(NotImplementedError, match=r"32-bit offsets.*xla"):
        large = dict(q=(3, 1, 8, 128), kv=(3, 2**20, 8, 128), cache="int8")
        attend(**large, **scales, implementation="triton")
    # as many entries in three layers, of which the kernel gets one
    stack = dict(q=(1, 1, 8, 128), kv=(3, 1, 2**20, 8, 128), cache="int8", layer=2)
    out, _ = attend(**stack, **scales, implementation="triton")
    assert out.shape == (1, 1, 8, 128)
    with pytest.raises(ValueError, match=r"int8.*float16"):
        quantize_cache(jnp.zeros((1, 2, 1, 32)), "float16")


def test_there_is_no_gradient():
    q, k = jnp.zeros((1, 1, 2, 32)), jnp.zeros((1, 40, 2, 32))
    now = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match="flash_attention"):
        jax.grad(lambda q: decode_attention(q, k, k, q_positions=now)[0].sum())(q)


@pytest.mark.parametrize("paged", [False, True])
def test_what_was_just_written_is_not_copied(paged):
    """XLA on a CPU made two arrays of a stack that goes on and is read in another shape."""
    line = 4096 // 32 if paged else 4096
    shape = (3, 32, line, 2, 64) if paged else (3, 1, line, 2, 64)
    pages = jnp.arange(32, dtype=jnp.int32)[None] if paged else None
    positions = jnp.arange(4096, dtype=jnp.int32)[None]

    def step(k, v, q, new):
        k, v = (x.at[1, 0, 5].set(new) for x in (k, v))
        out, _ = decode_attention(
            q, k, v, layer=jnp.int32(1), pages=pages, q_positions=positions[:, -1:],
            kv_positions=positions, implementation="xla",
        )  # fmt: skip
        return out, k, v

    stack, q = jnp.zeros(shape, jnp.float32), jnp.ones((1, 1, 4, 64), jnp.float32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(stack, stack, q, q[0, 0, :2]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < stack.nbytes / 3
