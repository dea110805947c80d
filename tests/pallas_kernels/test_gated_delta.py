# SPDX-License-Identifier: Apache-2.0
"""Chunks give what a scan token by token gives, in float64 to its last digits.

Kernels are interpreted, and held to the same scan in float32.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but

from pallas_kernels.gated_delta import gated_delta, gated_delta_chunks
from pallas_kernels.gated_delta.tile import unit_lower_inverse

B, K, N, H, V = 2, 2, 4, 8, 20
KERNELS = ("triton", "mosaic_tpu")


def problem(length, *, by_channel=False, dtype=np.float32, strong=False, seed=0):
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(B, length, K, H)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    gate = -np.exp(rng.normal(size=(B, length, N, *[H] * by_channel)) * (3 if strong else 1))
    x = {
        "q": q, "k": k, "v": rng.normal(size=(B, length, N, V)), "log_decay": 0.3 * gate,
        "beta": rng.uniform(0, 1, (B, length, N)), "state": rng.normal(size=(B, N, H, V)),
    }  # fmt: skip
    return {name: jnp.asarray(y, dtype) for name, y in x.items()}


def documents(length):
    """Documents that begin inside a chunk, at its border and twice in one; and pads."""
    starts, pads = np.zeros((B, length), bool), np.zeros((B, length), bool)
    starts[0, [length // 2, min(64, length - 1)]] = True
    starts[1, [0, length // 3, length // 3 + 1]] = True
    pads[0, -2:], pads[1, length // 3 - 1] = True, True
    return {"starts": jnp.asarray(starts), "pads": jnp.asarray(pads)}


@functools.partial(jax.jit, static_argnames=("implementation",))
def run(x, marks, implementation):
    return gated_delta(**x, **marks, implementation=implementation)


CASES = [(n, *kind) for n in (1, 7, 64, 150) for kind in itertools.product((False, True), repeat=3)]


@pytest.mark.parametrize(
    "length, by_channel, strong, packed", slow_but(CASES, lambda case: case[::2] == (150, True))
)
def test_chunks_are_the_scan(length, by_channel, strong, packed):
    with jax.enable_x64(True):
        x = problem(length, by_channel=by_channel, dtype=np.float64, strong=strong)
        marks = documents(length) if packed and length > 1 else {}
        found, expected = (run(x, marks, name) for name in ("xla", "reference"))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("by_channel", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_are_those_of_the_scan(by_channel):
    with jax.enable_x64(True):
        x, marks = problem(70, by_channel=by_channel, dtype=np.float64), documents(70)
        dout = tuple(np.cos(np.arange(y.size)).reshape(y.shape) for y in (x["v"], x["state"]))

        @functools.partial(jax.jit, static_argnums=1)
        def pulled(x, name):
            return jax.vjp(lambda x: run(x, marks, name), x)[1](dout)[0]

        found, expected = pulled(x, "xla"), pulled(x, "reference")
        for name in x:
            np.testing.assert_allclose(
                found[name], expected[name], atol=1e-10, rtol=0, err_msg=name
            )


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_are_the_scan(implementation, by_channel):
    """Key heads shared, several chunks, the last not full; more columns than a program walks."""
    x, marks = problem(150, by_channel=by_channel), documents(150)
    found, expected = (run(x, marks, name) for name in (implementation, "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6, rtol=0)


@pytest.mark.parametrize(
    "implementation, by_channel",
    slow_but(itertools.product(KERNELS, (False, True)), lambda case: case[1]),
)
def test_gradients_of_kernels_are_those_of_the_scan(implementation, by_channel):
    x, marks = problem(70, by_channel=by_channel), documents(70)
    dout = tuple(
        np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape) for y in (x["v"], x["state"])
    )

    @functools.partial(jax.jit, static_argnums=1)
    def pulled(x, name):
        return jax.vjp(lambda x: run(x, marks, name), x)[1](dout)[0]

    found, expected = pulled(x, implementation), pulled(x, "reference")
    for name, y in expected.items():
        bound = 2e-6 * float(jnp.abs(y).max())
        np.testing.assert_allclose(found[name], y, atol=bound, rtol=0, err_msg=name)


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_the_summary_of_kernels_is_what_they_make_of_any_state(implementation):
    x = problem(90, by_channel=True)
    arrays = [x[name] for name in ("q", "k", "v", "log_decay", "beta")]

    @jax.jit
    def after():
        transition, added = gated_delta_chunks(*arrays, implementation=implementation).summary()
        return jnp.einsum("bnij,bnjk->bnik", transition, x["state"]) + added

    np.testing.assert_allclose(after(), run(x, {}, "reference")[1], atol=3e-6, rtol=0)


@pytest.mark.parametrize("implementation", KERNELS)
def test_what_kernels_round_to_bfloat16(implementation):
    """Values and gradients are within a few roundings of the scan of the same inputs in float32."""
    x = problem(100)
    narrow = {name: y.astype(jnp.bfloat16) if name in "qkv" else y for name, y in x.items()}
    wide = {name: y.astype(jnp.float32) for name, y in narrow.items()}

    def pulled(x, name):
        out, pull = jax.vjp(lambda x: run(x, {}, name), x)
        return out, pull(jax.tree.map(jnp.ones_like, out))[0]

    (out, state), grads = pulled(narrow, implementation)
    (right, after), slopes = pulled(wide, "reference")
    assert out.dtype == grads["k"].dtype == jnp.bfloat16 and state.dtype == jnp.float32
    pairs = {"out": (out, right), "state": (state, after)}
    pairs |= {name: (grads[name], slopes[name]) for name in x}
    for name, (ours, theirs) in pairs.items():
        bound = 2**-6 * float(jnp.abs(theirs).max())
        np.testing.assert_allclose(
            ours.astype(jnp.float32), theirs, atol=bound, rtol=0, err_msg=name
        )


def test_dtypes_that_a_kernel_does_not_take_name_who_does():
    with jax.enable_x64(True):
        x = problem(20, dtype=np.float64)
        for name in KERNELS:
            with pytest.raises(NotImplementedError, match=r"float64.*xla"):
                gated_delta(**x, implementation=name)


def test_channels_that_a_kernel_does_not_take_name_who_does():
    q, v = jnp.zeros((1, 20, 1, 136)), jnp.zeros((1, 20, 1, 8))
    for k, wide in ((q, v), (v, q)):
        with pytest.raises(NotImplementedError, match=r"128 channels.*xla"):
            gate = jnp.zeros((1, 20, 1))
            gated_delta(k, k, wide, gate, gate, implementation="triton")


def test_a_row_of_documents_is_each_by_itself():
    x, length = problem(100), 37
    marks = {"starts": jnp.zeros((B, 100), bool).at[:, length].set(True)}
    out, state = run(x, marks, "xla")
    second = {k: y if k == "state" else y[:, length:] for k, y in x.items()}
    alone, after = run(second | {"state": jnp.zeros_like(x["state"])}, {}, "xla")
    np.testing.assert_allclose(out[:, length:], alone, atol=1e-5, rtol=0)
    np.testing.assert_allclose(state, after, atol=1e-5, rtol=0)


def test_pieces_chain():
    """The summary of tokens is what they make of any state."""
    x = problem(90, by_channel=True)
    arrays = [x[name] for name in ("q", "k", "v", "log_decay", "beta")]
    out, state = run(x, {}, "xla")
    first, second = ([y[:, part] for y in arrays] for part in (slice(0, 41), slice(41, 90)))

    @jax.jit
    def in_two():
        transition, added = gated_delta_chunks(*first).summary()
        middle = jnp.einsum("bnij,bnjk->bnik", transition, x["state"]) + added
        return gated_delta_chunks(*second).outputs(middle, 49)

    again, after = in_two()
    np.testing.assert_allclose(again, out[:, 41:], atol=1e-5, rtol=0)
    np.testing.assert_allclose(after, state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("by_channel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bfloat16_keeps_a_float32_state(by_channel):
    x = problem(200, by_channel=by_channel)
    narrow = {k: y if k == "state" else y.astype(jnp.bfloat16) for k, y in x.items()}
    out, state = run(narrow, {}, "xla")
    wide = {k: y.astype(jnp.float32) for k, y in narrow.items()}
    expected, after = run(wide, {}, "reference")
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_allclose(state, after, atol=1e-5, rtol=0)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2, rtol=1e-2)


def test_decays_that_vanish_and_equal_keys():
    """Neither overflow nor cancellation: exp(1000) appears nowhere, nor powers of a matrix."""
    x = problem(130, by_channel=True)
    dead = x["log_decay"].at[:, 40].set(-1000.0).at[:, 100, :, 0].set(-1e6)
    same = jnp.broadcast_to(x["k"][:, :1], x["k"].shape)
    ones = jnp.ones_like(x["beta"])
    equal = {"k": same, "beta": ones, "log_decay": jnp.zeros_like(dead)}
    for changed in ({"log_decay": dead}, equal):
        found, expected = (run(x | changed, {}, name) for name in ("xla", "reference"))
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


def test_the_inverse_of_a_triangle():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 64, 64)).astype(np.float32) / 8
    found = jax.jit(jax.vmap(unit_lower_inverse))(x)
    wide = np.tril(x.astype(np.float64), -1) + np.eye(64)
    np.testing.assert_allclose(found, np.linalg.inv(wide), atol=1e-4, rtol=0)
    ones = jax.jit(unit_lower_inverse)(np.ones((64, 64), np.float32))
    np.testing.assert_array_equal(ones, np.eye(64) - np.eye(64, k=-1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": (B, 7, K, H + 1)}, "needs q and k"),
        ({"v": (B, 7, 3, V)}, "a multiple of those of k"),
        ({"beta": (B, 7, N, 1)}, "log_decay must be"),
        ({"log_decay": (B, 7, N, 3)}, "log_decay must be"),
        ({"state": (B, N, V, H)}, "state must be"),
    ],
)
def test_shapes_that_make_no_sense(change, message):
    x = problem(7) | {name: jnp.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        gated_delta(**x)
    with pytest.raises(ValueError, match="implementation must be one of"):
        gated_delta(**problem(7), implementation="cuda")
    with pytest.raises(ValueError, match="starts must be bool"):
        gated_delta(**problem(7), starts=jnp.zeros((B, 7)))
