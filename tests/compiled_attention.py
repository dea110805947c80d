# SPDX-License-Identifier: Apache-2.0
"""Attention compiled for chips that are not there, once a process, and what is read off it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jaxcp
from jaxcp.compile import on_mesh, parse_target
from jaxcp.context_parallel import compiler_options
from pallas_kernels.flash_attention import tuning

CHIPS = {"v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1", "sm_120": "rtx-pro-6000:8"}
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 16384, 6, 2, 128  # a shard's; bfloat16
QUERIES = TOKENS * HEADS * HEAD_DIM  # elements of q on a shard
KEYS = TOKENS * KV_HEADS * HEAD_DIM  # elements of k on a shard, and of v


@dataclasses.dataclass(frozen=True)
class Compiled:
    text: str
    held_bytes: int  # temporaries and results: what is there beside the arguments


def mesh_over(where: str) -> Mesh:
    """One axis: over further ones, even of size one, shard_map sums every gradient."""
    target = parse_target(CHIPS.get(where, where))
    devices = target.mesh(seq=target.size).devices.reshape(-1)
    return Mesh(devices, ("seq",), axis_types=(AxisType.Explicit,))


@functools.cache
def compiled(
    where: str,
    strategy: jaxcp.context_parallel.Strategy,
    *,
    backward: bool = False,
    tokens: int = TOKENS,
    heads: tuple[int, int] = (HEADS, KV_HEADS),
    window: int | None = None,
) -> Compiled:
    """Attention, and with `backward` its gradient too, for a described machine or `rtx-...:n`.

    Arrays come `[B, T, N * H]`, as a projection makes them, and small tiles compile fast: neither
    changes what travels, when, or what is copied.
    """
    mesh = mesh_over(where)

    def like(width, dtype=jnp.bfloat16):
        shape = (1, tokens * mesh.size, *width)
        sharding = jax.sharding.NamedSharding(mesh, P(None, "seq"))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def forward(q, k, v, positions):
        q, k, v = (x.reshape(*x.shape[:2], -1, HEAD_DIM) for x in (q, k, v))
        out = jaxcp.context_parallel_attention(q, k, v, positions, strategy=strategy, window=window)
        return out.reshape(*out.shape[:2], -1)

    def both(q, k, v, positions, dout):
        out, pull = jax.vjp(lambda *qkv: forward(*qkv, positions), q, k, v)
        return out, *pull(dout)

    q, k = (like((n * HEAD_DIM,)) for n in heads)
    arrays = on_mesh((q, k, k, like((), jnp.int32), *([q] if backward else [])), mesh)
    platform = {"gpu": "cuda"}.get(mesh.devices[0].platform, mesh.devices[0].platform)
    small = tuning.Blocks(q=128, kv=128, sub=128, strip=128)
    rows = tuple((op, "", 128, 2, small) for op in ("mosaic_forward", "mosaic_backward"))
    table, tuning.TABLE = tuning.TABLE, rows + tuning.TABLE
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            step = jax.jit(both if backward else forward, compiler_options=compiler_options())
            found = step.trace(*arrays).lower(lowering_platforms=(platform,)).compile()
    finally:
        tuning.TABLE = table
    memory = found.memory_analysis()
    held = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return Compiled(found.as_text(), held)
