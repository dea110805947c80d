# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3 (and R1), and V3.2, whose attention an index makes sparse.

Multi-head latent attention, dense first layers, then experts in groups. Sources: arXiv 2412.19437
and 2512.02556.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.mla import IndexDims, LatentAttention, LatentDims
from jaxcp.layers.mlp import GatedMLP
from jaxcp.layers.moe import MoE
from jaxcp.layers.norm import RMSNorm
from jaxcp.layers.parameter import normal
from jaxcp.layers.rope import Rope, merged
from jaxcp.layers.routing import Routing
from jaxcp.layers.stack import Layers
from jaxcp.models.base import embed
from jaxcp.models.drafting import DraftingModel, JoinedMTP
from jaxcp.models.hf_config import SILU, HFConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekV3Config:
    """The shape of a DeepSeek-V3; with an `index` that of V3.2, whose layers attend to the
    `index.top_k` keys of best score.

    Raises:
      ValueError: sizes that cannot work, such as expert groups that do not divide the experts.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    latent: LatentDims
    index: IndexDims | None = None
    mlp_dim: int
    moe_dim: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int = 1
    first_dense_layers: int = 1
    routing: Routing
    rope: Rope
    mscale_all_dim: float = 0.0
    """YaRN's correction of the softmax: scores times `(0.1 * this * ln(factor) + 1) ** 2`."""
    max_positions: int
    norm_eps: float = 1e-6
    num_mtp_layers: int = 0
    """1 adds the layer that drafts the token after next."""
    dtype: str = "float32"
    remat: bool = False
    reproducible_experts: bool = False
    """MoE layers give the same bits on every mesh, slower (`MoE.reproducible`)."""

    def __post_init__(self):
        if not 0 <= self.first_dense_layers <= self.num_layers:
            raise ValueError(
                "needs 0 <= first_dense_layers <= num_layers; "
                f"got {self.first_dense_layers} of {self.num_layers}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                "needs 1 <= num_experts_per_tok <= num_experts; "
                f"got {self.num_experts_per_tok} of {self.num_experts}"
            )
        self.routing.check(self.num_experts, self.num_experts_per_tok)
        if self.num_mtp_layers not in (0, 1):
            raise NotImplementedError(
                "num_mtp_layers must be 0 or 1 (deeper drafts use the one layer again); "
                f"got {self.num_mtp_layers}"
            )

    @property
    def attention_scale(self) -> float:
        """What multiplies `q . k`."""
        factor = 1.0 if self.rope.yarn is None else self.rope.yarn.factor
        gain = 0.1 * self.mscale_all_dim * math.log(factor) + 1 if factor > 1 else 1.0
        return (self.latent.nope_dim + self.latent.rope_dim) ** -0.5 * gain**2

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> "DeepSeekV3Config":
        """From a `config.json` of model_type deepseek_v3, deepseek_v32 or kimi_k2, which is V3.

        Raises:
          KeyError: a field that decides what is computed is not there.
          NotImplementedError: a field with a value, or of a name, that is not known here.
        """
        d = HFConfig(fields, aliases=HF_ALIASES)
        layers, heads = d.size("num_hidden_layers"), d.size("num_attention_heads")
        d["q_lora_rank"] or _no_direct_queries()
        latent = LatentDims(
            q_rank=d.size("q_lora_rank"),
            kv_rank=d.size("kv_lora_rank"),
            nope_dim=d.size("qk_nope_head_dim"),
            rope_dim=d.size("qk_rope_head_dim"),
            value_dim=d.size("v_head_dim"),
        )
        d.only(
            hidden_act=SILU, attention_bias=(False,), mlp_bias=(False,),
            tie_word_embeddings=(False,), rope_interleave=(True,), scoring_func=("sigmoid",),
            topk_method=("noaux_tc",), moe_layer_freq=(1,), num_key_value_heads=(heads, None),
            qk_head_dim=(latent.nope_dim + latent.rope_dim,), head_dim=(latent.rope_dim,),
        )  # fmt: skip
        config = cls(
            vocab_size=d.size("vocab_size"),
            num_layers=layers,
            embed_dim=d.size("hidden_size"),
            num_heads=heads,
            latent=latent,
            index=_index(d, layers),
            mlp_dim=d.size("intermediate_size"),
            moe_dim=d.size("moe_intermediate_size"),
            num_experts=d.size("n_routed_experts"),
            num_experts_per_tok=d.size("num_experts_per_tok"),
            num_shared_experts=0 if d["n_shared_experts"] is None else d.count("n_shared_experts"),
            first_dense_layers=_dense_layers(d, layers),
            routing=Routing(
                normalise=d.flag("norm_topk_prob"),
                scale=d.number("routed_scaling_factor"),
                num_groups=d.size("n_group"),
                top_groups=d.size("topk_group"),
            ),
            rope=Rope.from_hf(d, interleaved=True),
            mscale_all_dim=float((merged(d) or {}).get("mscale_all_dim") or 0.0),
            max_positions=d.size("max_position_embeddings"),
            norm_eps=d.number("rms_norm_eps"),
            num_mtp_layers=d.count("num_nextn_predict_layers", None) or 0,
            dtype=d.dtype(published="bfloat16"),
        )
        d.finish()
        return config

    def to_hf(self) -> dict[str, Any]:
        """What `from_hf` reads."""
        rope = self.rope.to_hf()
        if self.mscale_all_dim:
            rope |= {"mscale": self.mscale_all_dim, "mscale_all_dim": self.mscale_all_dim}
            rope["attention_factor"] = 1.0 if self.rope.yarn is None else self.rope.yarn.gain
        d = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.embed_dim,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "q_lora_rank": self.latent.q_rank,
            "kv_lora_rank": self.latent.kv_rank,
            "qk_nope_head_dim": self.latent.nope_dim,
            "qk_rope_head_dim": self.latent.rope_dim,
            "v_head_dim": self.latent.value_dim,
            "intermediate_size": self.mlp_dim,
            "moe_intermediate_size": self.moe_dim,
            "n_routed_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "n_shared_experts": self.num_shared_experts,
            "first_k_dense_replace": self.first_dense_layers,
            "moe_layer_freq": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": self.routing.normalise,
            "routed_scaling_factor": self.routing.scale,
            "n_group": self.routing.num_groups,
            "topk_group": self.routing.top_groups,
            "num_nextn_predict_layers": self.num_mtp_layers,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "rope_parameters": rope,
            "rope_interleave": True,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "dtype": self.dtype,
        }
        if self.index is None:
            return d
        return d | {
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            "layer_types": ["indexed_attention"] * self.num_layers,
            "index_n_heads": self.index.num_heads,
            "index_head_dim": self.index.head_dim,
            "index_topk": self.index.top_k,
        }


HF_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}


def _index(d: HFConfig, layers: int) -> IndexDims | None:
    is_sparse = d.model_type == "deepseek_v32"
    kind = "indexed_attention" if is_sparse else "full_attention"
    d.leading("layer_types", layers, kind, kind)
    if not is_sparse:
        return None
    return IndexDims(
        num_heads=d.size("index_n_heads"),
        head_dim=d.size("index_head_dim"),
        top_k=d.size("index_topk"),
    )


def _dense_layers(d: HFConfig, layers: int) -> int:
    dense = d.count("first_k_dense_replace")
    if d.leading("mlp_layer_types", layers, "dense", "sparse") not in (None, dense):
        raise ValueError(
            f"{d.model_type}: mlp_layer_types and first_k_dense_replace must agree; "
            f"got first_k_dense_replace={dense} and mlp_layer_types={d['mlp_layer_types']}"
        )
    return dense


def _no_direct_queries():
    raise NotImplementedError("deepseek: queries without a latent (q_lora_rank=null) are not there")


class Block(nnx.Module):
    def __init__(self, config: DeepSeekV3Config, layer: int, rngs: nnx.Rngs):
        c = config
        std = c.embed_dim**-0.5
        out_std = std * (2 * c.num_layers) ** -0.5
        self.attention_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.attention = LatentAttention(
            c.embed_dim,
            c.num_heads,
            c.latent,
            rope=c.rope,
            scale=c.attention_scale,
            index=c.index,
            norm_eps=c.norm_eps,
            std=std,
            out_std=out_std,
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
                routing=c.routing,
                reproducible=c.reproducible_experts,
                std=std,
                out_std=out_std,
                rngs=rngs,
            )

    def __call__(self, x, positions, attend):
        x = x + self.attention(self.attention_norm(x), positions, attend)
        x_norm = self.mlp_norm(x)
        if isinstance(self.mlp, MoE):
            y, stats = self.mlp(x_norm, positions=positions)
            return x + y, stats
        return x + self.mlp(x_norm), None


class DeepSeekV3(DraftingModel):
    """DeepSeek-V3, V3.2 and Kimi K2, with random weights: `DeepSeekV3(config, rngs=nnx.Rngs(0))`.

    `model(tokens [B, T], positions [B, T])` gives float32 logits `[B, T, V]`. A published MTP
    layer was never run here.
    """

    def __init__(self, config: DeepSeekV3Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = normal(rngs, (config.vocab_size, config.embed_dim), ("vocab", "embed"), 1.0)
        self.layers = Layers([Block(config, i, rngs) for i in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.lm_head = normal(rngs, (config.embed_dim, config.vocab_size), ("embed", "vocab"), 0.01)
        if config.num_mtp_layers:
            self.mtp = JoinedMTP(
                config.embed_dim,
                norm=lambda: RMSNorm(config.embed_dim, eps=config.norm_eps),
                block=lambda: Block(config, config.num_layers, rngs),
                rngs=rngs,
            )

    def forward(self, tokens, positions, attend):
        x = self.embedded(tokens)
        x, stats = self.through(self.layers, x, attend, positions)
        return self.final_norm(x), stats

    def embedded(self, tokens):
        """`[..., D]` of token ids, in the dtype of the computation."""
        return embed(self.embed, tokens, jnp.dtype(self.config.dtype))

    def head_kernel(self):
        return self.lm_head.get_value()
