# SPDX-License-Identifier: Apache-2.0
"""The attention kernels become machine code for chips that are not there.

Compiling proves what the interpreter cannot: tiling, shared memory and VMEM, and that no score
matrix is left. That the machine code computes the right thing takes the chip.
"""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but

from jaxcp.compile import compile_for, parse_target
from pallas_kernels import flash_attention

# 2026-11: jax 0.11 and later warn when Pallas-Triton is used; it works through 0.12.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

TOKENS = 4096  # a device's share
TARGETS = {
    "rtx-pro-6000:1": "triton",
    "h200:1": "triton",
    "v5e:2x2": "mosaic_tpu",
    "v5p:2x2x1": "mosaic_tpu",
    "v6e:2x2": "mosaic_tpu",
    "tpu7x:2x2x1": "mosaic_tpu",
}


def compiled(target, head_dim, dtype="bfloat16", *, heads=4, soft_cap=None):
    """Forward and backward of one device's attention to its own tokens, under `shard_map`."""
    mesh = parse_target(target).mesh(seq=parse_target(target).size)
    by_tokens = P(None, "seq")

    def array(*shape, dtype=dtype):
        shape = (1, TOKENS * mesh.size, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, by_tokens))

    def local(q, k, v, positions, segments):
        return flash_attention(
            q,
            k,
            v,
            q_positions=positions,
            kv_positions=positions,
            q_segment_ids=segments,
            kv_segment_ids=segments,
            window=1000,
            soft_cap=soft_cap,
        )

    def loss(q, k, v, positions, segments):
        out, lse = jax.shard_map(local, out_specs=(by_tokens,) * 2)(q, k, v, positions, segments)
        return out.astype(jnp.float32).sum() + lse.sum()

    ids = array(dtype=jnp.int32), array(dtype=jnp.int32)
    kv = array(2, head_dim)
    step = jax.value_and_grad(loss, (0, 1, 2))
    return compile_for(step, (array(heads, head_dim), kv, kv, *ids), mesh)


def assert_holds(target, report, heads=4):
    # forward, and dq and dkv, which are one on a TPU; nothing replaced and nothing repeated
    assert report.kernels == (2 if TARGETS[target] == "mosaic_tpu" else 3)
    assert report.temp_bytes < heads * TOKENS * TOKENS * 4 / 4, "a quarter of the score matrix"


@pytest.mark.parametrize(
    "target, head_dim",
    slow_but(
        [
            *itertools.product(("rtx-pro-6000:1", "v6e:2x2"), (64, 128, 256)),
            *(("h200:1", 128), ("h200:1", 256), ("tpu7x:2x2x1", 128), ("tpu7x:2x2x1", 256)),
            *(("v5e:2x2", 64), ("v5p:2x2x1", 256)),
        ],
        lambda case: case == ("rtx-pro-6000:1", 128),
    ),
)
def test_forward_and_backward_compile(target, head_dim):
    assert_holds(target, compiled(target, head_dim))


@pytest.mark.parametrize(
    "target", ["rtx-pro-6000:1", pytest.param("v6e:2x2", marks=pytest.mark.slow)]
)
def test_float32_soft_cap_and_an_odd_group_compile(target):
    assert_holds(target, compiled(target, 48, "float32", heads=6, soft_cap=20.0), heads=6)


@pytest.mark.slow
def test_float16_and_head_dim_512_compile_on_a_gpu():
    assert_holds("rtx-pro-6000:1", compiled("rtx-pro-6000:1", 512, "float16"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "head_dim", "dtype"),
    [("v5p:2x2x1", 512, "bfloat16"), ("v6e:2x2", 320, "float16")],
)
def test_float16_and_head_dims_to_512_compile_on_a_tpu(target, head_dim, dtype):
    report = compiled(target, head_dim, dtype)
    assert report.kernels == 2
    assert report.temp_bytes < 4 * TOKENS * TOKENS * 4, "the score matrix"


def test_a_million_keys_compile():
    """Keys of 8 GiB: offsets do not fit 32 bits, and Pallas counts them with 64."""
    mesh = parse_target("rtx-pro-6000:1").mesh()

    def array(tokens, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, tokens, *shape), dtype)

    def attend(q, k, v, q_positions, kv_positions):
        return flash_attention(q, k, v, q_positions=q_positions, kv_positions=kv_positions)

    q, kv = array(4096, 32, 128), array(1 << 20, 32, 128)
    ids = array(4096, dtype=jnp.int32), array(1 << 20, dtype=jnp.int32)
    report = compile_for(attend, (q, kv, kv, *ids), mesh)
    assert report.kernels == 1
    assert report.temp_bytes < 64 << 20


@pytest.mark.parametrize(
    ("target", "temp_gib"),
    [("rtx-pro-6000:1", 0.5), pytest.param("v6e:2x2", 5, marks=pytest.mark.slow)],
)
def test_a_million_queries_and_a_million_keys_compile(target, temp_gib):
    """The lists of blocks, 8192 x 16384, are made some rows at a time."""
    tokens = 1 << 20

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, tokens, *shape), dtype)

    def attend(q, k, v, q_positions, kv_positions):
        return flash_attention(q, k, v, q_positions=q_positions, kv_positions=kv_positions)

    ids = (array(dtype=jnp.int32),) * 2
    kv = array(1, 128)
    mesh = parse_target(target).mesh(seq=parse_target(target).size)
    run = jax.shard_map(attend, in_specs=(P(),) * 5, out_specs=P())
    report = compile_for(run, (array(8, 128), kv, kv, *ids), mesh)
    assert report.kernels == 1
    assert report.temp_bytes < temp_gib * 2**30


@pytest.mark.parametrize("target", TARGETS)
def test_the_described_chip_picks_the_backend_and_its_blocks(target):
    from pallas_kernels.dispatch import device_kind, target_platform
    from pallas_kernels.flash_attention.api import BEST

    mesh = parse_target(target).mesh(seq=parse_target(target).size)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert BEST[target_platform()] == TARGETS[target]
        kind = mesh.devices.flat[0].device_kind
        # libtpu's "TPU v5" is the v5p; a row for it must not be the v5e's ("TPU v5 lite")
        assert device_kind() == {"TPU v5": "TPU v5p"}.get(kind, kind)
