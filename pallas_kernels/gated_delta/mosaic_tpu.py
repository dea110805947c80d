# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule for TPUs, through Pallas and Mosaic.

One kernel works all chunks, one walks them with the state in VMEM; each has a backward, which is
JAX's derivative of the same tile, made inside the kernel. Interpreted on CPU; inside `shard_map`
the interpreter needs the caller's `check_vma=False`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import target_platform
from pallas_kernels.gated_delta import tile, tiles
from pallas_kernels.gated_delta.tile import Chunk
from pallas_kernels.varying import like

VMEM = 64 << 20
"""Bytes of fast memory that a kernel may take."""


def tokens(dtype) -> tuple[int, int]:
    """See `xla.tokens`."""
    del dtype
    return 16, 64


def local(q, k, v, log_decay, beta, document) -> Chunk:
    """See `tiles.chunks_by_xla`."""
    tiles.check("mosaic_tpu", q, k, v)
    arrays = q, k, v, log_decay, beta, document
    products = tile.ROUNDED if tiles.narrow(q, k, v) else tile.EXACT
    return tiles.chunks_of_heads(*arrays, products=products, run=_keywords(*[pltpu.PARALLEL] * 3))


def local_backward(arrays, dparts: Chunk):
    return tiles.chunks_backward(arrays, dparts, run=_keywords(*[pltpu.PARALLEL] * 3))


def scan(parts: Chunk, state):
    """See `xla.scan`."""
    out, state, _ = _walk(parts, state)
    return out, state


def scan_backward(parts: Chunk, state, dout, dstate):
    """`(dparts, dstate)`: from the last chunk to the first."""
    _, _, before = _walk(parts._replace(reads=None, attended=None), state, keep=True)
    given, named = _given(parts)
    steps, heads = parts.u.shape[0], parts.u.shape[2]
    product = tile.rounded_with_derivative if tiles.narrow(parts.u) else tile.exactly
    back = functools.partial(_block, heads=heads, chunk=lambda c: steps - 1 - c)
    douts = [] if dout is None else [dout]
    shapes = [like(state, x.shape, x.dtype) for x in (*given, dstate)]
    *dparts, dstate = pl.pallas_call(
        functools.partial(_walk_back, named=named, product=product),
        grid=(parts.u.shape[1], heads, steps),
        in_specs=[back(x) for x in (*given, before, *douts)] + [_state(dstate)],
        out_specs=[back(x) for x in given] + [_state(dstate)],
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM(dstate.shape[2:], jnp.float32)],
        name="gated_delta_scan_backward",
        **_keywords(pltpu.PARALLEL, pltpu.PARALLEL, pltpu.ARBITRARY),
    )(*given, before, *douts, dstate)
    return parts._replace(**dict(zip(named, dparts, strict=True))), dstate


def _walk(parts: Chunk, state, *, keep: bool = False):
    """`(out, state, states before each chunk)`, each None where it is not asked for."""
    given, named = _given(parts)
    (c, b, n, length, v), h = parts.u.shape, parts.w.shape[-1]
    outs = {"state": like(state, state.shape, state.dtype)}
    if parts.reads is not None:
        outs["out"] = like(state, (c, b, n, length, v), state.dtype)
    if keep:
        outs["before"] = like(state, (c, b, n, h, v), state.dtype)
    specs = {name: _block(x, heads=n) for name, x in outs.items()} | {"state": _state(state)}
    product = tile.rounded if tiles.narrow(parts.u) else tile.exactly
    results = pl.pallas_call(
        functools.partial(_walk_kernel, named=named, outs=tuple(outs), product=product),
        grid=(b, n, c),
        in_specs=[_block(x, heads=n) for x in given] + [_state(state)],
        out_specs=[*specs.values()],
        out_shape=[*outs.values()],
        scratch_shapes=[pltpu.VMEM((h, v), jnp.float32)],
        name="gated_delta_scan",
        **_keywords(pltpu.PARALLEL, pltpu.PARALLEL, pltpu.ARBITRARY),
    )(*given, state)
    found = dict(zip(outs, results, strict=True))
    return found.get("out"), found["state"], found.get("before")


def _walk_kernel(*refs, named, outs, product):
    given, start = refs[: len(named)], refs[len(named)]
    results = dict(zip(outs, refs[len(named) + 1 :], strict=False))
    carried = refs[-1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = start[...]

    state = carried[...]
    if "before" in results:
        results["before"][...] = state
    out, after = tile.advance(_chunk(given, named), state, product=product)
    if out is not None:
        results["out"][...] = out
    carried[...] = results["state"][...] = after


def _walk_back(*refs, named, product):
    n = len(named)
    given, before = refs[:n], refs[n]
    *douts, dlast = refs[n + 1 : -n - 2]
    dgiven, dfirst, carried = refs[-n - 2 : -2], refs[-2], refs[-1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = dlast[...]

    advance = functools.partial(tile.advance, product=product)
    _, pull = jax.vjp(advance, _chunk(given, named), before[...])
    dparts, dstate = pull((douts[0][...] if douts else None, carried[...]))
    for name, ref in zip(named, dgiven, strict=True):
        ref[...] = getattr(dparts, name).astype(ref.dtype)
    carried[...] = dfirst[...] = dstate


def _given(parts: Chunk):
    """The matrices that there are, and their names."""
    found = {name: x for name, x in parts._asdict().items() if x is not None}
    return [*found.values()], tuple(found)


def _chunk(refs, named):
    values = (ref[...].astype(jnp.float32) for ref in refs)
    return tiles.chunk_of(named, values)


def _block(x, *, heads, chunk=lambda c: c):
    """Turn `tiles.block` round, for a program `(row, head, chunk)`."""
    shape, place = tiles.block(x, heads, chunk)
    return pl.BlockSpec(shape, lambda b, n, c: place(c, n, b))


def _state(x):
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, n, c: (b, n, 0, 0))


def _keywords(*semantics):
    return {
        "interpret": target_platform() == "cpu",
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=VMEM
        ),
    }
