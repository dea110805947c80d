# SPDX-License-Identifier: Apache-2.0
"""Ring attention in a model that is not ours: Flax NNX, Flax Linen, plain JAX.

python examples/ring_in_your_model.py --smoke  # 8 emulated CPU devices; --hosts 4: on each of 4
Each block is a whole model. Only the lines marked `# <-` are not what one device would have.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen, nnx
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import PartitionSpec as P

import jaxcp
from jaxcp.cli.several import Processes, one_of

EMBED, HEADS = 64, 8


def in_nnx(x, positions):
    class Block(nnx.Module):
        def __init__(self, rngs, attention_fn):
            options = {"decode": False, "attention_fn": attention_fn, "rngs": rngs}
            self.attention = nnx.MultiHeadAttention(HEADS, EMBED, **options)
            self.mlp = nnx.Linear(EMBED, EMBED, rngs=rngs)

        def __call__(self, x, mask=None):
            return x + self.mlp(jax.nn.gelu(self.attention(x, mask=mask)))

    one = Block(nnx.Rngs(0), nnx.dot_product_attention)
    many = Block(nnx.Rngs(0), jaxcp.attention_fn(jaxcp.Ring()))  # <-
    mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
    return lambda x: one(x, mask), jax.jit(many)


def in_linen(x, positions):
    ring = jaxcp.attention_fn(jaxcp.Ring())  # <-

    class Block(linen.Module):
        attention_fn: object

        @linen.compact
        def __call__(self, x, mask=None):
            attention = linen.MultiHeadDotProductAttention(HEADS, attention_fn=self.attention_fn)
            return x + linen.Dense(EMBED)(jax.nn.gelu(attention(x, mask=mask)))

    one, many = Block(linen.dot_product_attention), Block(ring)
    mask = linen.make_causal_mask(jnp.ones(x.shape[:2]))
    params = one.init(jax.random.key(0), x, mask)
    return lambda x: one.apply(params, x, mask), jax.jit(lambda x: many.apply(params, x))


def in_plain_jax(x, positions):
    w_qkv = EMBED**-0.5 * jax.random.normal(jax.random.key(0), (3, EMBED, HEADS, EMBED // HEADS))
    w_out = EMBED**-0.5 * jax.random.normal(jax.random.key(1), (HEADS, EMBED // HEADS, EMBED))

    def block(x, attend):
        q, k, v = jnp.einsum("btd,cdnh->cbtnh", x, w_qkv)
        return x + jnp.einsum("btnh,nhd->btd", attend(q, k, v), w_out)

    ring = functools.partial(jaxcp.ring_attention, positions=positions)  # <-
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    return lambda x: block(x, dense), jax.jit(lambda x: block(x, ring))


@dataclasses.dataclass
class Args:
    tokens: int = 4096
    hosts: int = 1  # processes that run this, one a host
    smoke: bool = False  # tiny, on 8 emulated CPU devices


def main(args):
    shards, layout = jax.device_count(), jaxcp.Zigzag()
    places = -(-args.tokens // (2 * shards)) * 2 * shards  # so many fill the layout
    x = np.random.default_rng(0).standard_normal((1, places, EMBED)).astype(np.float32)
    batch = layout.permute({"x": x, "positions": np.arange(places, dtype=np.int32)[None]}, shards)
    mesh = jax.make_mesh((shards,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    for build in (in_nnx, in_linen, in_plain_jax):
        one, many = build(x, batch["positions"])
        with jax.set_mesh(mesh):
            out = process_allgather(many(jax.device_put(batch["x"], P(None, "seq"))), tiled=True)
        error = np.abs(layout.inverse(out, shards, places) - one(x)).max()
        if jax.process_index() == 0:
            print(f"{build.__name__}: {places:,} tokens over {shards}, differs by {error:.1e}")
        assert error < (1e-4 if jax.default_backend() == "cpu" else 5e-2)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    if args.smoke:
        jaxcp.emulate_devices(8)
        args = dataclasses.replace(args, tokens=200)
    with one_of(Processes(distributed=args.hosts > 1)):
        main(args)
