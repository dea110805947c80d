# SPDX-License-Identifier: Apache-2.0
"""Attention over the cache, from the definition: over any number of turns and shards."""

import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense
from flax import nnx

import jaxcp
from jaxcp import GPTConfig
from jaxcp.models.base import LanguageModel, embed
from jaxcp.sharding import place, tokens_spec

VOCAB, HEADS, KV_HEADS, HEAD_DIM = 128, 4, 2, 8
SINKS = (-1.0, 0.0, 1.0, 2.0)
CLOSE = {"atol": 2e-5, "rtol": 0}


class Attending(LanguageModel):
    """Attention and nothing else: `x = x + attend(q, k, v)` a layer; `options` of each.

    The last layer should be a full one: each row of those before it then shows in the last row's
    "logits", which are x.
    """

    def __init__(self, *options):
        self.options = tuple(tuple(x.items()) for x in options)
        size = {"num_layers": len(self.options), "num_heads": HEADS, "embed_dim": HEADS * HEAD_DIM}
        self.config = GPTConfig(vocab_size=VOCAB, max_positions=10_000, **size)
        rng = np.random.default_rng(0)
        self.table = nnx.Param(rng.normal(size=(VOCAB, HEADS * HEAD_DIM)).astype(np.float32))
        shape = len(self.options), HEADS * HEAD_DIM, HEADS + 2 * KV_HEADS, HEAD_DIM
        self.weights = nnx.Param(rng.normal(size=shape, scale=0.2).astype(np.float32))

    def cache_shape(self):
        return {"layers": len(self.options), "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}

    def forward(self, tokens, positions, attend):
        x, spec = embed(self.table[...], tokens, jnp.float32), tokens_spec(tokens)
        spec = None if spec is None else type(spec)(*spec, None)
        eye = jnp.eye(HEADS * HEAD_DIM).reshape(HEADS, HEAD_DIM, -1)
        for layer, options in enumerate(self.options):
            q, k, v = heads(jnp.einsum("btd,dnh->btnh", x, self.weights[layer]))
            options = dict(options)
            if "sinks" in options:
                options["sinks"] = jnp.asarray(options["sinks"])
            out = attend(q, k, v, layer=layer, **options)
            x += jnp.einsum("btnh,nhd->btd", out, eye, out_sharding=spec)
        return x, None

    def head_kernel(self):
        return jnp.eye(HEADS * HEAD_DIM)

    def expected(self, tokens):
        """What `forward` gives for `tokens [B, T]`, in float64."""
        x, weights = (np.asarray(y[...], np.float64) for y in (self.table, self.weights))
        x = x[tokens]
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        for layer, options in enumerate(self.options):
            q, k, v = heads(np.einsum("btd,dnh->btnh", x, weights[layer]))
            x = x + dense(q, k, v, positions, **dict(options)).reshape(x.shape)
        return x


def heads(qkv):
    return qkv[:, :, :HEADS], qkv[:, :, HEADS:-KV_HEADS], qkv[:, :, -KV_HEADS:]


def talk(model, tokens, turns, **options):
    """Yield `(ends [B], logits [B, V], cache)` after each turn: lengths `[B]`, or one for all.

    A turn of 1 is a step of decoding.
    """
    rows = np.arange(len(tokens))
    cache, ends = model.init_cache(len(tokens), tokens.shape[1] + 10), np.zeros(len(tokens), int)
    for turn in turns:
        lengths = np.broadcast_to(turn, rows.shape)
        where = ends[:, None] + np.arange(lengths.max())
        block = tokens[rows[:, None], np.minimum(where, tokens.shape[1] - 1)]
        if turn == 1:
            logits, cache = jaxcp.decode_step(model, cache, block[:, 0])
        else:
            logits, cache = jaxcp.prefill(model, cache, block, lengths=lengths, **options)
        ends = ends + lengths
        yield ends, logits, cache


def ids(*shape):
    return np.random.default_rng(1).integers(0, VOCAB, shape)


def check(model, tokens, turns, **options):
    """Every turn's logits are those of the whole sequence."""
    expected = model.expected(tokens)
    for ends, logits, _ in talk(place(model), tokens, turns, **options):
        wanted = expected[np.arange(len(tokens)), ends - 1]
        np.testing.assert_allclose(logits, wanted, **CLOSE, err_msg=f"to {ends}")


# What a layer may ask of it


@pytest.mark.parametrize("axes", [{}, {"seq": 3, "model": 2}], ids=["one device", "seq=3, model=2"])
def test_sinks_scale_and_soft_cap(axes, mesh_of):
    """Prefill, a turn for each of the two kernels of `Extend`, and a whole sequence."""
    if axes:
        mesh_of(**axes)
    options = {"scale": 0.7, "soft_cap": 1.5, "sinks": SINKS}
    model, tokens = Attending({"window": 20, **options}, {"window": None, **options}), ids(1, 120)
    check(model, tokens, [80, 20, 1])
    found = jaxcp.logits(place(model), tokens)
    np.testing.assert_allclose(found, model.expected(tokens), **CLOSE)
