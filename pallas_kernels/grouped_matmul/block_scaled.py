# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul by the block-scaled matrix instructions of sm_120: MXFP8 and NVFP4.

Rows and weights both have narrow values and a scale for every 32 (MXFP8) or 16 (NVFP4) entries
along the dimension summed over; the tensor core multiplies and scales. Pallas has no such product,
but the Triton dialect in jaxlib does: `_dot_scaled` is a primitive of our own whose lowering is
put into Pallas-Triton's private table. It is refused on releases other than those in `PROVED`,
which were all that there were, and on GPUs of another architecture, where Triton would multiply in
bfloat16 and say nothing. It cannot be interpreted: `implementation="emulated"` computes the same
from the same values and scales with plain JAX, on any platform. No gradient.

Source: OCP Microscaling Formats 1.0 (MX); PTX ISA 8.7, warp-level block scaling (NVFP4).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.extend.core import Primitive
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import find
from pallas_kernels.dispatch import device_kind, target_platform
from pallas_kernels.grouped_matmul import groups, reference
from pallas_kernels.grouped_matmul.narrow import E2M1_LARGEST, E4M3_LARGEST, to_e2m1

# jax on which the machine code for sm_120a has block-scaled instructions; never run on the chip
PROVED = ("0.10.2", "0.11.0", "0.11.1", "0.11.2", "0.12.0", "0.12.0.1")
CAPABILITY = (12, 0)
FORMATS = {"mxfp8": 32, "nvfp4": 16}  # entries that share a scale
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """Arrays `[..., K]` as narrow values with scales along K.

    mxfp8: float8_e4m3fn `values [..., K]`, `scales [..., K / 32]` uint8, exponents of 2 plus 127.
    nvfp4: uint8 `values [..., K / 2]`, two e2m1 each, the first in the low bits; float8_e4m3fn
    `scales [..., K / 16]`. `row_scales [...]` float32 multiply whole rows (1 in mxfp8).
    """

    values: Array
    scales: Array
    row_scales: Array
    format: str = dataclasses.field(metadata={"static": True})

    @property
    def width(self) -> int:
        return self.scales.shape[-1] * FORMATS[self.format]


def block_scaled(x: Float[Array, "... K"], format: str) -> BlockScaled:
    """Round `x` to "mxfp8" or "nvfp4", blocks along the last axis.

    Raises:
      ValueError: another format, or K that is no multiple of its block.
    """
    if format not in FORMATS or x.shape[-1] % FORMATS[format]:
        raise ValueError(
            f"format one of {FORMATS} whose block divides K; got {format!r}, {x.shape}"
        )
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, FORMATS[format])
    greatest = jnp.abs(blocks).max(-1)
    if format == "mxfp8":
        ratio = jnp.maximum(greatest, 2.0**-100) / E4M3_LARGEST
        _, exponent = jnp.frexp(ratio)  # ratio <= 2 ** exponent
        values = jnp.ldexp(blocks, -exponent[..., None]).astype(jnp.float8_e4m3fn)
        ones = jnp.ones(x.shape[:-1], jnp.float32)
        return BlockScaled(
            values.reshape(x.shape), (exponent + 127).astype(jnp.uint8), ones, format
        )
    row = jnp.maximum(greatest.max(-1), 2.0**-100) / (E4M3_LARGEST * E2M1_LARGEST)
    scales = (greatest / E2M1_LARGEST / row[..., None]).astype(jnp.float8_e4m3fn)
    exact = scales.astype(jnp.float32)
    unit = blocks / jnp.where(exact > 0, exact * row[..., None], 1.0)[..., None]
    pairs = to_e2m1(unit).reshape(*x.shape[:-1], -1, 2)
    return BlockScaled(pairs[..., 0] | pairs[..., 1] << 4, scales, row, format)


def exact(x: BlockScaled) -> Float[Array, "... K"]:
    """The float32 array that values and scales stand for."""
    if x.format == "mxfp8":
        values = x.values.astype(jnp.float32)
        scales = jnp.ldexp(jnp.float32(1), x.scales.astype(jnp.int32) - 127)
    else:
        codes = jnp.stack([x.values & 15, x.values >> 4], axis=-1)
        sign = 1 - 2 * (codes >> 3).astype(jnp.float32)
        values = sign * jnp.array(E2M1, jnp.float32)[codes & 7]
        scales = x.scales.astype(jnp.float32)
    values = values.reshape(*x.scales.shape, FORMATS[x.format]) * scales[..., None]
    return values.reshape(*x.scales.shape[:-1], x.width) * x.row_scales[..., None]


def grouped_matmul_block_scaled(
    lhs: Float[Array, "M K"],
    rhs: BlockScaled,
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """`grouped_matmul(lhs, weights, group_sizes)` with both sides in the format of `rhs`.

    Args:
      rhs: `block_scaled(weights.swapaxes(1, 2), format)`: `[E, F, K]`, blocks along K.
      implementation: "triton" (sm_120), "emulated"; None: the first on GPUs, else the second.
    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
      NotImplementedError: "triton" with a jax on which it is not proved, or not for sm_120.
    """
    if implementation is None:
        implementation = "triton" if target_platform() == "gpu" else "emulated"
    if implementation not in ("triton", "emulated"):
        raise ValueError(f'implementation is "triton" or "emulated"; got {implementation!r}')
    if lhs.ndim != 2 or lhs.shape[1] != rhs.width or group_sizes.shape != rhs.values.shape[:1]:
        raise ValueError(
            "needs lhs [M,K], rhs [E,F,K], group_sizes [E]; got "
            f"{lhs.shape}, {(*rhs.scales.shape[:-1], rhs.width)}, {group_sizes.shape}"
        )
    rows = block_scaled(lhs, rhs.format)
    if implementation == "emulated":
        weights = exact(rhs).swapaxes(1, 2)
        return reference.forward(exact(rows), weights, group_sizes).astype(lhs.dtype)
    return _triton(rows, rhs, group_sizes, lhs.dtype)


def _triton(lhs, rhs, group_sizes, dtype):
    _check_target()
    _register()
    (m, k), (e, n) = (lhs.row_scales.shape[0], lhs.width), rhs.row_scales.shape
    block_m, block_n, block_k = (128 if m > 32 * e else 16), 128, 128
    if n % block_n or k % block_k:
        raise NotImplementedError(f"multiples of 128; got K={k}, F={n}: pad the weights")
    tiles = groups.tiles(group_sizes, m, block_m)
    kernel = functools.partial(
        _kernel, block=(block_m, block_n, block_k), shape=(e, n, k), format=rhs.format
    )
    return pl.pallas_call(
        kernel,
        grid=(tiles.group.shape[0] * (n // block_n),),
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=8 if block_m == 128 else 4, num_stages=2),
        name=f"grouped_matmul_{rhs.format}",
    )(*tiles, lhs.values, lhs.scales, lhs.row_scales, rhs.values, rhs.scales, rhs.row_scales)


def _check_target():
    platform, chip = target_platform(), find(device_kind())
    other = chip is not None and (chip.nvidia is None or chip.nvidia.capability != CAPABILITY)
    if platform != "gpu" or other or jax.__version__ not in PROVED:
        raise NotImplementedError(
            "block-scaled products need sm_120 and go through a private hook of Pallas-Triton, "
            f"proved on jax {', '.join(PROVED)}; this is jax {jax.__version__} for "
            f"{device_kind() if platform == 'gpu' else platform}; use implementation='emulated', "
            "or grouped_matmul with quantize()"
        )


def _kernel(
    group_ref, start_ref, end_ref, a_ref, a_scale_ref, a_row_ref, b_ref, b_scale_ref, b_row_ref,
    out_ref, *, block, shape, format,
):  # fmt: skip
    (block_m, block_n, block_k), (groups_, n, k) = block, shape
    tile, column = pl.program_id(0) // (n // block_n), pl.program_id(0) % (n // block_n)
    group, start, end = group_ref[tile], start_ref[tile], end_ref[tile]
    steps = jnp.where(group < groups_, jnp.int32(k // block_k), jnp.int32(0))
    group = jnp.minimum(group, groups_ - 1)
    rows, columns = pl.ds(start, block_m), pl.ds(column * block_n, block_n)
    mine = (start + jnp.arange(block_m) < end)[:, None]
    packed, shared = block_k // (1 if format == "mxfp8" else 2), block_k // FORMATS[format]

    def read(ref, at, width):  # a row that is not ours holds anything and is not written
        return plgpu.load(ref.at[rows, at], mask=jnp.broadcast_to(mine, (block_m, width)))

    def step(index, total):
        at, scales = pl.ds(index * packed, packed), pl.ds(index * shared, shared)
        return _dot_scaled.bind(
            read(a_ref, at, packed), b_ref[group, columns, at], total,
            read(a_scale_ref, scales, shared), b_scale_ref[group, columns, scales], format=format,
        )  # fmt: skip

    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((block_m, block_n), jnp.float32))
    row = plgpu.load(a_row_ref.at[rows], mask=mine[:, 0], other=0)
    total *= row[:, None] * b_row_ref[group, columns][None, :]
    mask = jnp.broadcast_to(mine, total.shape)
    plgpu.store(out_ref.at[rows, columns], total.astype(out_ref.dtype), mask=mask)


_dot_scaled = Primitive("dot_scaled")  # a [M, K], b [N, K], c [M, N], scales of a and of b


@_dot_scaled.def_abstract_eval
def _(a, b, c, a_scale, b_scale, *, format):
    del a, b, a_scale, b_scale, format
    return c


@functools.cache
def _register():
    # private: jax._src.pallas.triton.lowering, see PROVED. There is no public way to emit an
    # operation of the Triton dialect that Pallas does not know.
    from jax._src.pallas.triton import lowering

    @lowering.register_lowering(_dot_scaled)
    def _(ctx, a, b, c, a_scale, b_scale, *, format):
        kind = 0 if format == "mxfp8" else 4  # E4M3, E2M1 of the dialect's ScaleDotElemType
        (out,) = ctx.avals_out
        del out
        return lowering.tt_dialect.dot_scaled(
            c.type, a, lowering.tt_dialect.trans(b, (1, 0)), c, kind, kind, False,
            a_scale=a_scale, b_scale=b_scale, lhs_k_pack=True, rhs_k_pack=True,
        )  # fmt: skip
