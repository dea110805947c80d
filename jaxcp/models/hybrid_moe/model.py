# SPDX-License-Identifier: Apache-2.0
"""Hy3's architecture (model_type hy_v3), plus a layer pattern.

QK-normed grouped-query attention, dense first layers, then mixture of experts. The pattern adds
layers with a sliding window and layers without rotary positions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.attention import Attention
from jaxcp.layers.mlp import GatedMLP
from jaxcp.layers.moe import MoE
from jaxcp.layers.ngram import NGram
from jaxcp.layers.norm import RMSNorm
from jaxcp.layers.parameter import normal
from jaxcp.layers.rope import Rope
from jaxcp.layers.routing import Routing
from jaxcp.models.base import LanguageModel, embed

OURS = {
    "layer_pattern": "layer_pattern",
    "sliding_window": "window",
    "full_attention_heads": "full_num_heads",
    "ngram_width": "ngram_width",
    "ngram_dim": "ngram_dim",
}
"""config.json keys that Hy3's own lacks -> our fields. A plain Hy3 has none of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridMoEConfig:
    """`layer_pattern` is cycled over the layers.

    G: full attention with rotary positions (all of Hy3), L: sliding window with rotary positions,
    N: full attention without positions.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    moe_dim: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int = 1
    first_dense_layers: int = 1
    route_scale: float = 1.0
    route_norm: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    layer_pattern: str = "G"
    window: int | None = None
    full_num_heads: int | None = None
    """Query heads of G and N layers, where not `num_heads`: full attention pays for each."""
    ngram_width: int = 1
    """Tokens that the embedding sees: 1 is the token itself, 12 adds the eleven before it."""
    ngram_dim: int = 16
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        if not self.layer_pattern or set(self.layer_pattern) - set("GLN"):
            raise ValueError(f"layer_pattern is made of G, L and N; got {self.layer_pattern!r}")
        if "L" in self.layer_pattern and (self.window is None or self.window < 1):
            raise ValueError(f"a pattern with L needs window >= 1; got window={self.window}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads; got {self.num_kv_heads} and {self.num_heads}"
            )
        if self.full_num_heads is not None and self.full_num_heads % self.num_kv_heads:
            raise ValueError(
                "num_kv_heads must divide full_num_heads; "
                f"got {self.num_kv_heads} and {self.full_num_heads}"
            )
        if self.ngram_width < 1 or self.ngram_dim < 1:
            raise ValueError(
                "ngram_width and ngram_dim must be at least 1; "
                f"got {self.ngram_width} and {self.ngram_dim}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions; got {self.head_dim}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                "needs 1 <= num_experts_per_tok <= num_experts; "
                f"got {self.num_experts_per_tok} of {self.num_experts}"
            )

    def kind(self, layer: int) -> str:
        """G, L or N."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    def query_heads(self, layer: int) -> int:
        return self.num_heads if self.kind(layer) == "L" else self.full_num_heads or self.num_heads

    @classmethod
    def from_hf(cls, d: dict[str, Any]) -> "HybridMoEConfig":
        """From a `config.json` of model_type hy_v3 (Hy3's, or one that `to_hf` wrote)."""
        _refuse(d)
        types = d.get("mlp_layer_types")
        dense = d.get("first_k_dense_replace", 1) if types is None else types.count("dense")
        if types is not None and types != ["dense"] * dense + ["sparse"] * (len(types) - dense):
            raise NotImplementedError(
                f"hy_v3: dense layers must come first; got mlp_layer_types={types}"
            )
        rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise NotImplementedError(
                f"hy_v3: rope_type must be default; got {rope['rope_type']!r}"
            )
        return cls(
            vocab_size=d["vocab_size"],
            num_layers=d["num_hidden_layers"],
            embed_dim=d["hidden_size"],
            num_heads=d["num_attention_heads"],
            num_kv_heads=d["num_key_value_heads"],
            head_dim=d["head_dim"],
            mlp_dim=d["intermediate_size"],
            moe_dim=d.get("moe_intermediate_size") or d["expert_hidden_dim"],
            num_experts=d["num_experts"],
            num_experts_per_tok=d["num_experts_per_tok"],
            num_shared_experts=d.get("num_shared_experts", 1),
            first_dense_layers=dense,
            route_scale=d.get("router_scaling_factor", 1.0),
            route_norm=d.get("route_norm", True),
            rope_theta=rope.get("rope_theta", d.get("rope_theta", 10_000.0)),
            norm_eps=d["rms_norm_eps"],
            dtype=d.get("dtype") or d.get("torch_dtype") or "float32",
            **{field: d[key] for key, field in OURS.items() if d.get(key) is not None},
        )

    def to_hf(self) -> dict[str, Any]:
        """What `from_hf` reads."""
        sparse = self.num_layers - self.first_dense_layers
        d = {
            "architectures": ["HYV3ForCausalLM"],
            "model_type": "hy_v3",
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.embed_dim,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp_dim,
            "moe_intermediate_size": self.moe_dim,
            "expert_hidden_dim": self.moe_dim,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_shared_experts": self.num_shared_experts,
            "first_k_dense_replace": self.first_dense_layers,
            "mlp_layer_types": ["dense"] * self.first_dense_layers + ["sparse"] * sparse,
            "router_scaling_factor": self.route_scale,
            "route_norm": self.route_norm,
            "qk_norm": True,
            "moe_router_use_sigmoid": True,
            "moe_router_enable_expert_bias": True,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": False,
            "enable_lm_head_fp32": True,
            "dtype": self.dtype,
        }
        return d | (
            {}
            if (self.layer_pattern, self.full_num_heads, self.ngram_width) == ("G", None, 1)
            else {key: getattr(self, field) for key, field in OURS.items()}
        )


def _refuse(d: dict[str, Any]) -> None:
    """Raise for options that a hy_v3 config may carry and this model does not have."""
    wanted = {
        "qk_norm": True,
        "moe_router_use_sigmoid": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
    wrong = {k: d[k] for k, v in wanted.items() if d.get(k, v) != v}
    if wrong:
        raise NotImplementedError(
            f"hy_v3: supported are { ({k: wanted[k] for k in wrong}) }; got {wrong}"
        )


class Block(nnx.Module):
    def __init__(self, config: HybridMoEConfig, layer: int, rngs: nnx.Rngs):
        c, kind = config, config.kind(layer)
        std = c.embed_dim**-0.5
        out_std = std * (2 * c.num_layers) ** -0.5
        self.attention_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.attention = Attention(
            c.embed_dim,
            c.query_heads(layer),
            c.num_kv_heads,
            c.head_dim,
            layer=layer,
            std=std,
            out_std=out_std,
            qk_norm_eps=c.norm_eps,
            qk_gain=1.2 if kind == "L" else 1.5,
            rope=None if kind == "N" else Rope(theta=c.rope_theta),
            window=c.window if kind == "L" else None,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.mlp: GatedMLP | MoE
        if layer < c.first_dense_layers:
            self.mlp = GatedMLP(c.embed_dim, c.mlp_dim, std=std, out_std=out_std, rngs=rngs)
        else:
            self.mlp = MoE(
                c.embed_dim,
                c.moe_dim,
                num_experts=c.num_experts,
                num_experts_per_tok=c.num_experts_per_tok,
                num_shared_experts=c.num_shared_experts,
                routing=Routing(normalise=c.route_norm, scale=c.route_scale),
                std=std,
                out_std=out_std,
                rngs=rngs,
            )

    def __call__(self, x, positions, attend):
        x = x + self.attention(self.attention_norm(x), positions, attend)
        y = self.mlp(self.mlp_norm(x))
        y, load = y if isinstance(self.mlp, MoE) else (y, None)
        return x + y, load


class HybridMoE(LanguageModel):
    """Hy3 and its hybrids. `HybridMoE(config, rngs=nnx.Rngs(0))`."""

    def __init__(self, config: HybridMoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = normal(rngs, (config.vocab_size, config.embed_dim), ("vocab", "embed"), 1.0)
        if config.ngram_width > 1:
            self.ngram = NGram(
                config.vocab_size, config.ngram_dim, config.ngram_width, config.embed_dim, rngs=rngs
            )
        self.layers = nnx.List([Block(config, i, rngs) for i in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.lm_head = normal(rngs, (config.embed_dim, config.vocab_size), ("embed", "vocab"), 0.01)

    def forward(self, tokens, positions, attend):
        x = self._embedded(tokens, jnp.dtype(self.config.dtype))
        loads = []
        for layer in self.layers:
            block = jax.checkpoint(_block, static_argnums=3) if self.config.remat else _block
            x, load = block(layer, x, positions, attend)
            loads += [] if load is None else [load]
        return self.final_norm(x), jnp.stack(loads) if loads else None

    def windows(self):
        return tuple(layer.attention.window for layer in self.layers)

    def _embedded(self, tokens, dtype):
        c = self.config
        if tokens.shape[2:] != ((c.ngram_width,) if c.ngram_width > 1 else ()):
            raise ValueError(
                f"this model embeds windows of {c.ngram_width} tokens; got ids {tokens.shape}. "
                "Make them with jaxcp.layers.ngram.windows before the layout permutes, "
                "or use jaxcp.logits"
            )
        if c.ngram_width == 1:
            return embed(self.embed, tokens, dtype)
        return embed(self.embed, tokens[..., 0], dtype) + self.ngram(tokens, dtype)

    def head_kernel(self):
        return self.lm_head.get_value()


def _block(layer, x, positions, attend):
    return layer(x, positions, attend)
