# SPDX-License-Identifier: Apache-2.0
"""Parts that the kernels of both kinds of chip share: a program for each chunk of each head.

Arrays are `[c, B, heads, rows, columns]`, and a program has the rows and columns of one.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta import tile
from pallas_kernels.gated_delta.tile import Chunk, Products
from pallas_kernels.varying import like

AT_ONCE = 64
"""Chunks of a row that are worked at once: it bounds memory."""
DTYPES = ("float32", "bfloat16", "float16")


def check(name: str, q, k, v, *, widest: int | None = None) -> None:
    """Raise NotImplementedError for dtypes, and heads of over `widest` channels, that it lacks."""
    widths = k.shape[-1], v.shape[-1]
    if widest is not None and max(widths) > widest:
        raise NotImplementedError(
            f"{name}: at most {widest} channels of a key and a value; got {widths}. "
            'Take implementation="xla"'
        )
    for x in (q, k, v):
        if x.dtype.name not in DTYPES:
            raise NotImplementedError(
                f'{name}: {", ".join(DTYPES)}; got {x.dtype}. Take implementation="xla"'
            )


def narrow(*arrays) -> bool:
    """True if products may round their operands: all of these are bfloat16."""
    return all(x.dtype == jnp.bfloat16 for x in arrays)


def chunks_by_xla(products: Products, q, k, v, log_decay, beta, document) -> Chunk:
    """`tile.local` of chunks `[c, B, N, L, ...]`, of q and k `[c, B, K, L, H]`, and of `document
    [c, B, 1, L]`."""
    q, k, v = (x.astype(beta.dtype) for x in (q, k, v))
    times = v.shape[2] // k.shape[2]
    q, k = (x if times == 1 else jnp.repeat(x, times, axis=2) for x in (q, k))
    arrays = q, k, v, log_decay, beta, document
    heads = jax.vmap(
        functools.partial(tile.local, products=products), in_axes=(0, 0, 0, 0, 0, None)
    )
    one = jax.checkpoint(jax.vmap(heads))
    if k.shape[0] <= AT_ONCE:
        return jax.checkpoint(jax.vmap(jax.vmap(heads)))(*arrays)
    return lax.map(lambda now: one(*now), arrays, batch_size=AT_ONCE)


def chunks_of_heads(q, k, v, log_decay, beta, document, *, products: Products, run: Any) -> Chunk:
    """`tile.local` of every chunk; `run` are keywords of `pallas_call`.

    What is multiplied again is kept in bfloat16 where it would be rounded then.
    """
    small = narrow(q, k, v)
    arrays = q, k, v, log_decay, beta, document
    c, b, n = v.shape[:3]
    one = [x.shape[-2:] for x in arrays]
    parts = jax.eval_shape(tile.local, *(jax.ShapeDtypeStruct(x, jnp.float32) for x in one))
    wide = jnp.bfloat16 if small else jnp.float32
    kinds = parts._replace(**{name: wide for name in parts._fields})._replace(passes=jnp.float32)
    shapes = [
        like(v, (c, b, n, *part.shape), dtype) for part, dtype in zip(parts, kinds, strict=True)
    ]
    out = _programs(
        functools.partial(_local, products=products),
        arrays, shapes, n, "gated_delta_local", run,
    )  # fmt: skip
    return Chunk(*out)


def chunks_backward(arrays, dparts: Chunk, *, run: Any):
    """The gradients of q, k, v, log_decay and beta, those of q and k for each head of v."""
    c, b, n = arrays[2].shape[:3]
    products = tile.DERIVABLE if narrow(*arrays[:3]) else tile.EXACT
    shapes = [like(arrays[2], (c, b, n, *x.shape[-2:]), jnp.float32) for x in arrays[:5]]
    return _programs(
        functools.partial(_local_backward, products=products),
        (*arrays, *dparts), shapes, n, "gated_delta_local_backward", run,
    )  # fmt: skip


def block(x, heads: int, chunk=lambda c: c) -> tuple[tuple, Callable]:
    """The matrix of `x [c, B, K, ...]` for a program `(chunk, head of v, row)`: shape and place."""
    if x.ndim == 4:  # one for all heads
        return (None, None, *x.shape[2:]), lambda c, n, b: (chunk(c), b, 0, 0)
    times = heads // x.shape[2]
    return (None, None, None, *x.shape[3:]), lambda c, n, b: (chunk(c), b, n // times, 0, 0)


def chunk_of(named: Sequence[str], values: Iterable[Any]) -> Chunk:
    """A chunk of parts by name; others are None."""
    found: dict[str, Any] = dict.fromkeys(Chunk._fields)
    return Chunk(**found | dict(zip(named, values, strict=True)))


def _programs(kernel, arrays, shapes, heads, name, run):
    c, b = arrays[0].shape[:2]
    return pl.pallas_call(
        kernel,
        grid=(c, heads, b),
        in_specs=[pl.BlockSpec(*block(x, heads)) for x in arrays],
        out_specs=[pl.BlockSpec(*block(x, heads)) for x in shapes],
        out_shape=shapes,
        name=name,
        **run,
    )(*arrays)


def _local(*refs, products):
    q, k, v, log_decay, beta, document, *outs = refs
    found = Chunk(*outs)
    for name, part in tile.parts(products, q, k, v, log_decay, beta[...], document[...]):
        ref = getattr(found, name)
        ref[...] = part.astype(ref.dtype)


def _local_backward(*refs, products):
    *arrays, document = (ref[...].astype(jnp.float32) for ref in refs[:6])
    dparts = Chunk(*(ref[...].astype(jnp.float32) for ref in refs[6:12]))
    work = functools.partial(tile.local, document=document, products=products)
    for ref, grad in zip(refs[12:], jax.vjp(work, *arrays)[1](dparts), strict=True):
        ref[...] = grad
