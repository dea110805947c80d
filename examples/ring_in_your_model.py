# SPDX-License-Identifier: Apache-2.0
"""Ring attention in a model that is not ours: Flax NNX, Flax Linen, plain JAX.

python examples/ring_in_your_model.py --smoke    # 8 emulated CPU devices

Each block is a whole model. Only the lines marked `# <-` are not what one device would have.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import jaxcp

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
    scale = EMBED**-0.5
    w_qkv = scale * jax.random.normal(jax.random.key(0), (3, EMBED, HEADS, EMBED // HEADS))
    w_out = scale * jax.random.normal(jax.random.key(1), (HEADS, EMBED // HEADS, EMBED))

    def block(x, attend):
        q, k, v = jnp.einsum("btd,cdnh->cbtnh", x, w_qkv)
        return x + jnp.einsum("btnh,nhd->btd", attend(q, k, v), w_out)

    def ring(q, k, v):
        return jaxcp.ring_attention(q, k, v, positions)  # <-

    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    return lambda x: block(x, dense), jax.jit(lambda x: block(x, ring))


@dataclasses.dataclass
class Args:
    tokens: int = 4096
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
            out = many(jax.device_put(batch["x"], P(None, "seq")))
        error = np.abs(layout.inverse(out, shards, places) - one(x)).max()
        print(f"{build.__name__}: {places:,} tokens over {shards} devices, differs by {error:.1e}")
        assert error < (1e-4 if jax.default_backend() == "cpu" else 5e-2)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    if args.smoke:
        jaxcp.emulate_devices(8)
        args = dataclasses.replace(args, tokens=200)
    main(args)
