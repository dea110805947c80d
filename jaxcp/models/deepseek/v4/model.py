# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4: attention that mixes windows and compressed blocks, four residual streams, experts.

Source: the report of DeepSeek-V4.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.compressed import CompressedAttention
from jaxcp.layers.hyper_connections import HyperConnection, StreamsToOne
from jaxcp.layers.linear import linear
from jaxcp.layers.mlp import SwiGLU
from jaxcp.layers.moe import MoE
from jaxcp.layers.norm import RMSNorm
from jaxcp.layers.parameter import RouterTable, normal
from jaxcp.layers.routing import Routing
from jaxcp.layers.stack import Layers
from jaxcp.models.base import embed
from jaxcp.models.deepseek.v4.config import DeepSeekV4Config
from jaxcp.models.drafting import DraftingModel
from jaxcp.sharding import tokens_spec


class Block(nnx.Module):
    def __init__(self, config: DeepSeekV4Config, layer: int, rngs: nnx.Rngs):
        c, e, s = config, config.experts, config.streams
        std = c.embed_dim**-0.5
        out_std = std * (2 * c.num_layers) ** -0.5
        kind = c.kind(layer)
        streams = functools.partial(
            HyperConnection, iterations=s.iterations, eps=s.eps, norm_eps=c.norm_eps, rngs=rngs
        )
        self.attention_streams = streams(c.embed_dim, s.count)
        self.attention_norm = RMSNorm(c.embed_dim, eps=c.norm_eps, float32_scale=True)
        self.attention = CompressedAttention(
            c.embed_dim,
            c.heads,
            window=c.window,
            ratio=c.ratio(layer),
            index=c.index if kind == "C" else None,
            rope=c.rope if kind == "W" else c.compressed_rope,
            norm_eps=c.norm_eps,
            std=std,
            out_std=out_std,
            rngs=rngs,
        )
        self.mlp_streams = streams(c.embed_dim, s.count)
        self.mlp_norm = RMSNorm(c.embed_dim, eps=c.norm_eps, float32_scale=True)
        by_id = layer < e.hash_layers
        self.experts_of_token = _table(c.vocab_size, e.count, e.per_tok) if by_id else None
        self.mlp = MoE(
            c.embed_dim,
            e.dim,
            num_experts=e.count,
            num_experts_per_tok=e.per_tok,
            num_shared_experts=e.shared,
            routing=Routing(scores="sqrt_softplus", selection_bias=not by_id, scale=e.route_scale),
            activation=SwiGLU(limit=e.limit),
            reproducible=c.reproducible_experts,
            std=std,
            out_std=out_std,
            rngs=rngs,
        )

    def __call__(self, x, tokens, positions, attend):
        """Streams `[B, T, S, D]`, and what the router did."""
        y, how = self.attention_streams(x)
        y = self.attention(self.attention_norm(y), positions, attend)
        x = self.attention_streams.renew(x, y, how)
        y, how = self.mlp_streams(x)
        table = self.experts_of_token
        chosen = None if table is None else embed(table, tokens, jnp.int32)
        y, stats = self.mlp(self.mlp_norm(y), chosen, positions=positions)
        return self.mlp_streams.renew(x, y, how), stats


def _table(vocab_size: int, num_experts: int, k: int) -> RouterTable:
    """Token ids dealt out evenly; a published model brings its own."""
    first = jnp.arange(vocab_size, dtype=jnp.int32)[:, None] * k
    experts = (first + jnp.arange(k, dtype=jnp.int32)) % num_experts
    return RouterTable(experts, axes=("vocab", None))


class MTP(nnx.Module):
    """The layer that drafts the token after next, from the trunk's streams and the next token.

    Wired as DeepSeek's own inference code reads; neither that code nor a published MTP layer was
    ever run against this one. Streams are those before they become one; a state and the embedding
    are projected and added, and there is no exception for position 0.
    """

    def __init__(self, config: DeepSeekV4Config, rngs: nnx.Rngs):
        c, d = config, config.embed_dim
        norm = functools.partial(RMSNorm, d, eps=c.norm_eps, float32_scale=True)
        self.embed_norm, self.hidden_norm, self.final_norm = norm(), norm(), norm()
        self.from_embed = normal(rngs, (d, d), ("embed", "embed"), d**-0.5, summed=1)
        self.from_hidden = normal(rngs, (d, d), ("embed", "embed"), d**-0.5, summed=1)
        self.block = Block(c, c.num_layers, rngs)
        self.streams_to_one = StreamsToOne(
            d, c.streams.count, eps=c.streams.eps, norm_eps=c.norm_eps, rngs=rngs
        )

    def __call__(self, embedded, streams, tokens, positions, attend):
        e = self.embed_norm(embedded)
        e = linear("btc,cd->btd", e, self.from_embed)
        x = self.hidden_norm(streams)
        x = linear("btsc,cd->btsd", x, self.from_hidden)
        return self.block(x + e[:, :, None], tokens, positions, attend)


class DeepSeekV4(DraftingModel):
    """DeepSeek-V4: windows beside compressed and selected entries, residual streams, experts.

    `model(tokens, positions)` gives float32 logits `[B, T, V]`. Tokens keep a layout's order, which
    compression must know.

    >>> model = jaxcp.DeepSeekV4(config, rngs=nnx.Rngs(0))
    """

    def __init__(self, config: DeepSeekV4Config, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = normal(rngs, (c.vocab_size, c.embed_dim), ("vocab", "embed"), 1.0)
        self.layers = Layers([Block(c, i, rngs) for i in range(c.num_layers)])
        self.streams_to_one = StreamsToOne(
            c.embed_dim, c.streams.count, eps=c.streams.eps, norm_eps=c.norm_eps, rngs=rngs
        )
        self.final_norm = RMSNorm(c.embed_dim, eps=c.norm_eps, float32_scale=True)
        self.lm_head = normal(rngs, (c.embed_dim, c.vocab_size), ("embed", "vocab"), 0.01)
        if c.num_mtp_layers:
            self.mtp = MTP(c, rngs)

    def forward(self, tokens, positions, attend):
        x, stats = self.trunk(tokens, positions, attend)
        return self.hidden_of(x), stats

    def trunk(self, tokens, positions, attend):
        """Streams `[B, T, S, D]` after the last layer, for `draft`, and what its routers did."""
        with jax.named_scope("embed"):
            x = self.embedded(tokens, positions)
        return self.through(self.layers, x, attend, tokens, positions)

    def hidden_of(self, state):
        return self.final_norm(self.streams_to_one(state))

    def drafted(self, state):
        return self.mtp.final_norm(self.mtp.streams_to_one(state))

    def embedded(self, tokens, positions):
        """The residual streams `[B, T, S, D]` before the first layer: all are the embedding."""
        del positions  # attention turns by them
        x = embed(self.embed, tokens, jnp.dtype(self.config.dtype))[:, :, None]
        spec = tokens_spec(x)
        sharding = None if spec is None else type(spec)(*spec, None, None)
        shape = *x.shape[:2], self.config.streams.count, x.shape[3]
        return jnp.broadcast_to(x, shape, out_sharding=sharding)
