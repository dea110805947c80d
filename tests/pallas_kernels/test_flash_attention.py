# SPDX-License-Identifier: Apache-2.0
"""Every implementation of flash attention, against float64 and against its own promises."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but

from pallas_kernels import PAD_POSITION, flash_attention
from pallas_kernels.flash_attention import Mask, attention_backward, attention_forward, row_delta
from pallas_kernels.flash_attention.api import IMPLEMENTATIONS
from pallas_kernels.testing.flash_attention import CASES, TOLERANCE, check

KERNELS = ("triton", "mosaic_tpu")


TELLING = ("everything", "bfloat16, everything", "window, bidirectional")
TELLING += ("pads and rows with nothing to see",)
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


def normal(key, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(key), shape, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_parts_add_up(implementation):
    """A ring has part of the keys at a time and the whole row's lse: its sums must be exact."""
    q, dout = normal(0, 1, 130, 4, 32), normal(1, 1, 130, 4, 32)
    k, v = normal(2, 1, 130, 2, 32), normal(3, 1, 130, 2, 32)
    dlse = normal(4, 1, 130, 4)
    positions = jnp.arange(130, dtype=jnp.int32)[None]
    options = dict(mask=Mask(window=90), soft_cap=None, scale=0.2, implementation=implementation)

    @jax.jit
    def gradients(q, k, v, dout, dlse):
        out, lse = attention_forward(q, k, v, positions, positions, None, None, **options)
        delta = row_delta(out, dout, dlse)
        parts = [slice(0, 130), slice(0, 50), slice(50, 130)]
        return [
            attention_backward(
                q, k[:, at], v[:, at], positions, positions[:, at], None, None, lse, dout, delta,
                **options,
            )
            for at in parts
        ]  # fmt: skip

    whole, one, two = gradients(q, k, v, dout, dlse)
    for name, together, a, b in zip("qkv", whole, one, two, strict=True):
        assert together.dtype == jnp.float32
        parts = a + b if name == "q" else jnp.concatenate([a, b], axis=1)
        np.testing.assert_allclose(parts, together, atol=10 * TOLERANCE["float32"], rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_results_of_bfloat16_inputs(implementation):
    """What a ring merges has not been rounded to bfloat16 on the way."""
    q, k, v = (normal(i, 1, 64, 2, 32, dtype=jnp.bfloat16) for i in range(3))
    positions = jnp.arange(64, dtype=jnp.int32)[None]
    out, _ = attention_forward(
        q, k, v, positions, positions, None, None, mask=Mask(), soft_cap=None, scale=0.2,
        out_dtype=jnp.float32, implementation=implementation,
    )  # fmt: skip
    assert out.dtype == jnp.float32
    assert (out != out.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("implementation", KERNELS)
def test_blocks_with_nothing_to_see_are_not_multiplied(implementation):
    """NaN in keys, values and queries of whole blocks that nobody sees reaches no result."""
    positions = jnp.arange(256, dtype=jnp.int32)[None].at[:, 128:].set(PAD_POSITION)
    hidden = jnp.isin(positions, PAD_POSITION)[..., None, None]
    q, k, v = (normal(i, 1, 256, 1, 32) for i in range(3))

    @jax.jit
    def run(q, k, v):
        def loss(q, k, v):
            out, lse = flash_attention(
                q, k, v, q_positions=positions, kv_positions=positions,
                implementation=implementation,
            )  # fmt: skip
            return out[:, :128].sum() + lse[:, :128].sum(), (out, lse)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    clean = run(q, k, v)
    poisoned = run(*(jnp.where(hidden, jnp.nan, x) for x in (q, k, v)))
    chex.assert_trees_all_equal(clean, poisoned)


@pytest.mark.parametrize("implementation", KERNELS)
def test_what_a_kernel_cannot_do_names_who_can(implementation):
    def attend(head_dim, dtype):
        x = jnp.zeros((1, 16, 1, head_dim), dtype)
        return flash_attention(x, x, x, implementation=implementation)

    with pytest.raises(NotImplementedError, match="xla"):
        attend(520, jnp.float32)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=r"float64.*xla"):
        attend(64, jnp.float64)


@pytest.mark.parametrize("implementation", KERNELS)
def test_inside_shard_map(implementation):
    """The interpreter needs check_vma=False there; compiled kernels do not (test_compile_...)."""
    mesh = jax.make_mesh((2,), ("seq",), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("seq")
    q, k, v = (normal(i, 2, 40, 2, 32) for i in range(3))
    spread = jax.device_put((q, k, v), jax.sharding.NamedSharding(mesh, spec))

    def local(q, k, v):
        return flash_attention(q, k, v, implementation=implementation)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 2, check_vma=False
    )
    for a, b in zip(jax.jit(sharded)(*spread), jax.jit(local)(q, k, v), strict=True):
        np.testing.assert_array_equal(a, b)
