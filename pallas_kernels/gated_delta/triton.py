# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule for NVIDIA GPUs, through Pallas and XLA's Triton.

One kernel works all chunks, a program each; one walks them, a program a head and some columns of
its state, which stays in registers. The walk has a backward, which is JAX's derivative of the same
tile, made inside the kernel; what several programs of a head find is summed outside. No atomics: a
run repeats bit by bit. Interpreted on CPU; inside `shard_map` the interpreter needs the caller's
`check_vma=False`.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import target_platform
from pallas_kernels.flash_attention.blocks import pad_axis
from pallas_kernels.gated_delta import tile, tiles, tuning
from pallas_kernels.gated_delta.tile import Chunk
from pallas_kernels.varying import like

# 2026-11: jax 0.11 and later warn about Pallas-Triton whenever a program is lowered. That is after
# the pallas_call has returned, so it cannot be silenced around the call. It works through jax 0.12.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def tokens(dtype) -> tuple[int, int]:
    """See `xla.tokens`; longer chunks spill registers, in float32 they exceed shared memory."""
    del dtype
    return 16, 32


def local(q, k, v, log_decay, beta, document) -> Chunk:
    """See `tiles.chunks_by_xla`, which takes float32: tiles of it exceed shared memory."""
    tiles.check("triton", q, k, v, widest=128)
    arrays = q, k, v, log_decay, beta, document
    if not tiles.narrow(q, k, v):
        return tiles.chunks_by_xla(tile.EXACT, *arrays)
    run = _run(_tuned("triton_local", max(k.shape[-1], v.shape[-1]), q.dtype))
    # as exact as three products of TF32 are: true float32 would take the registers of two tiles
    exact = functools.partial(tile.exactly, precision=lax.DotAlgorithmPreset.TF32_TF32_F32_X3)
    products = tile.ROUNDED if run["interpret"] else tile.ROUNDED._replace(exact=exact)
    parts = tiles.chunks_of_heads(*_powers(arrays), products=products, run=run)
    return _cut(parts, k.shape[-1], v.shape[-1])


def local_backward(arrays, dparts: Chunk):
    """See `tiles.chunks_backward`; by XLA: the derivative of a tile exceeds shared memory."""
    products = tile.DERIVABLE if tiles.narrow(*arrays[:3]) else tile.EXACT

    def work(q, k, v, log_decay, beta):
        parts = tiles.chunks_by_xla(products, q, k, v, log_decay, beta, arrays[-1])
        return jax.tree.map(lambda x, d: x.astype(d.dtype), parts, dparts)

    return jax.vjp(work, *arrays[:-1])[1](dparts)


def scan(parts: Chunk, state):
    """See `xla.scan`."""
    h, v = state.shape[-2:]
    out, after, _ = _walk(parts, state)
    return None if out is None else out[..., :v], after[..., :h, :v]


def scan_backward(parts: Chunk, state, dout, dstate):
    """`(dparts, dstate)`: from the last chunk to the first."""
    h, v = state.shape[-2:]
    _, _, before = _walk(parts._replace(reads=None, attended=None), state, keep=True)
    walk = _Walk("triton_scan_backward", parts)
    columns = [walk.state(before[..., :v])] + ([] if dout is None else [walk.wide(dout)])
    last = walk.state(dstate)
    results = [(x if name == "u" else walk.share_of(x)) for name, x in walk.given.items()]
    *dparts, dstate = walk.run(
        functools.partial(_walk_back, product=walk.derivable, named=walk.named),
        [*walk.inputs, *((x, COLUMNS) for x in columns), (last, COLUMNS)],
        [*zip(results, walk.kinds(SHARE), strict=True), (last, COLUMNS)],
        name="gated_delta_scan_backward",
    )
    found = {
        name: x if name == "u" else x.sum(0) for name, x in zip(walk.named, dparts, strict=True)
    }
    grads = _cut(parts._replace(**found), h, v)
    return jax.tree.map(lambda d, x: d.astype(x.dtype), grads, parts), dstate[..., :h, :v]


def _walk(parts: Chunk, state, *, keep: bool = False):
    """`(out, state, states before each chunk)`, the first and last where they are asked for; all
    with the rows and columns that programs have."""
    walk = _Walk("triton_scan", parts)
    start = walk.state(state)
    c, b, n, length, _ = parts.u.shape
    outs = {"state": start.shape}
    if parts.reads is not None:
        outs["out"] = c, b, n, length, start.shape[-1]
    if keep:
        outs["before"] = c, *start.shape
    results = walk.run(
        functools.partial(_walk_kernel, product=walk.product, named=walk.named, outs=tuple(outs)),
        [*walk.inputs, (start, COLUMNS)],
        [(jax.ShapeDtypeStruct(shape, jnp.float32), COLUMNS) for shape in outs.values()],
        name="gated_delta_scan",
    )
    found = dict(zip(outs, results, strict=True))
    return found.get("out"), found["state"], found.get("before")


COLUMNS, WHOLE, SHARE = "columns", "whole", "share"
"""Parts of an array that a program has: its columns, all of its matrix, or its own of several."""


class _Walk:
    """All chunks of a head, and some columns of its state: what a program is given."""

    def __init__(self, op: str, parts: Chunk):
        (_, self.batch, self.heads, _, v), h = parts.u.shape, parts.w.shape[-1]
        self.row = _tuned(op, h, parts.u.dtype)  # columns are cut, whatever their number
        self.size, self.height = min(self.row.columns, _power(v)), _power(h)
        self.width = pl.cdiv(v, self.size) * self.size
        narrow = tiles.narrow(parts.u)
        self.product = tile.rounded if narrow else tile.exactly
        self.derivable = tile.rounded_with_derivative if narrow else tile.exactly
        given = _grown(parts)._replace(u=self.wide(parts.u))._asdict()
        self.given = {name: x for name, x in given.items() if x is not None}
        self.named = tuple(self.given)
        self.inputs = [*zip(self.given.values(), self.kinds(WHOLE), strict=True)]

    def kinds(self, others: str):
        """Parts of each of `given` that a program has: the columns of u, `others` of the rest."""
        return [COLUMNS if name == "u" else others for name in self.named]

    def wide(self, x):
        return pad_axis(x, self.width, x.ndim - 1)

    def state(self, x):
        return self.wide(pad_axis(x, self.height, x.ndim - 2))

    def share_of(self, x):
        return jax.ShapeDtypeStruct((self.width // self.size, *x.shape), x.dtype)

    def run(self, kernel, arrays, results, name):
        """Call a kernel on `(array, kind)`; it makes float32 of these shapes and kinds."""
        first = arrays[0][0]
        return pl.pallas_call(
            kernel,
            grid=(self.width // self.size, self.heads, self.batch),
            in_specs=[self._spec(x.shape, kind) for x, kind in arrays],
            out_specs=[self._spec(x.shape, kind) for x, kind in results],
            out_shape=[like(first, x.shape, jnp.float32) for x, _ in results],
            name=name,
            **_run(self.row),
        )(*(x for x, _ in arrays))

    def _spec(self, shape, kind):
        if kind == SHARE:
            _, c, _, _, *matrix = shape
            return pl.BlockSpec((None, c, None, None, *matrix), lambda j, n, b: (j, 0, b, n, 0, 0))
        columns = self.size if kind == COLUMNS else shape[-1]
        chunks, matrix = shape[:-4], (shape[-2], columns)
        first = (0,) * len(chunks)

        def place(j, n, b):
            return (*first, b, n, 0, j if kind == COLUMNS else 0)

        return pl.BlockSpec((*chunks, None, None, *matrix), place)


def _walk_kernel(*refs, product, named, outs):
    given, start = refs[: len(named)], refs[len(named)]
    results = dict(zip(outs, refs[len(named) + 1 :], strict=True))

    def step(i, state):
        if "before" in results:
            results["before"][i] = state
        out, after = tile.advance(_chunk(given, named, i), state, product=product)
        if out is not None:
            results["out"][i] = out
        return after

    results["state"][...] = lax.fori_loop(0, given[0].shape[0], step, start[...])


def _walk_back(*refs, product, named):
    n = len(named)
    given, before = refs[:n], refs[n]
    *douts, last = refs[n + 1 : -n - 1]
    dgiven, first = refs[-n - 1 : -1], refs[-1]
    steps = given[0].shape[0]
    advance = functools.partial(tile.advance, product=product)

    def step(t, dstate):
        i = steps - 1 - t
        _, pull = jax.vjp(advance, _chunk(given, named, i), before[i])
        dparts, dstate = pull((douts[0][i] if douts else None, dstate))
        for name, ref in zip(named, dgiven, strict=True):
            ref[i] = getattr(dparts, name)
        return dstate

    first[...] = lax.fori_loop(0, steps, step, last[...])


def _chunk(refs, named, i):
    values = (ref[i].astype(jnp.float32) for ref in refs)
    return tiles.chunk_of(named, values)


def _power(size):
    return max(16, pl.next_power_of_2(size))


def _powers(arrays):
    """q, k, v and a decay a channel, with as many columns as Triton wants."""
    q, k, v, log_decay, *rest = arrays
    h = k.shape[-1]
    q, k, v = (pad_axis(x, _power(x.shape[-1]), x.ndim - 1) for x in (q, k, v))
    if log_decay.shape != rest[0].shape:
        log_decay = pad_axis(log_decay, _power(h), log_decay.ndim - 1)
    return q, k, v, log_decay, *rest


def _grown(parts: Chunk) -> Chunk:
    """Parts with as many key channels, and columns of u, as Triton wants."""

    def columns(x):
        return x if x is None else pad_axis(x, _power(x.shape[-1]), 4)

    passes = parts.passes
    if passes.shape[3] > 1:
        passes = pad_axis(passes, _power(passes.shape[3]), 3)
    return parts._replace(
        w=columns(parts.w), u=columns(parts.u), kept=columns(parts.kept), passes=passes,
        reads=columns(parts.reads),
    )  # fmt: skip


def _cut(parts: Chunk, h: int, v: int) -> Chunk:
    """Undo `_grown`."""
    return parts._replace(
        w=parts.w[..., :h], u=parts.u[..., :v], kept=parts.kept[..., :h],
        passes=parts.passes[..., :h, :],
        reads=None if parts.reads is None else parts.reads[..., :h],
    )  # fmt: skip


def _tuned(op, head_dim, dtype):
    return tuning.blocks(op, head_dim, dtype, interpret=target_platform() == "cpu")


def _run(row):
    return {
        "interpret": target_platform() == "cpu",
        "compiler_params": plgpu.CompilerParams(num_warps=row.warps, num_stages=row.stages),
    }
