# SPDX-License-Identifier: Apache-2.0
"""config.json of Kimi Linear, in both directions: as the hub has it, and as transformers writes it.

Where a field is not there, it is what transformers takes then.
"""

from collections.abc import Mapping
from typing import Any

from jaxcp.layers.gated_delta import DeltaDims
from jaxcp.layers.mla import LatentDims
from jaxcp.layers.routing import Routing
from jaxcp.models.hf_config import SILU, HFConfig, shortest_cycle
from jaxcp.models.kimi_linear.config import KimiLinearConfig

KINDS = {"linear_attention": "R", "full_attention": "G"}
ALIASES = {
    "max_position_embeddings": "model_max_length",
    "n_group": "num_expert_group",
    "n_shared_experts": "num_shared_experts",
    "norm_topk_prob": "moe_renormalize",
    "num_experts_per_tok": "num_experts_per_token",
    "num_local_experts": "num_experts",
}
HARMLESS = "head_dim", "rope_theta", "rope_scaling", "rope_parameters"
"""No position turns anything, and heads have their width from other fields."""
DELTA = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
"""Fields of the hub's `linear_attn_config`, and transformers' names for them."""
LAYERS = {"kda_layers": "R", "full_attn_layers": "G"}


def read(fields: Mapping[str, Any]) -> KimiLinearConfig:
    """Read a `config.json` of model_type kimi_linear.

    Raises:
      KeyError: a field that decides what is computed is not there.
      NotImplementedError: a field that changes what the model computes and is not known here.
      ValueError: fields that contradict each other.
    """
    fields, by_number = _flat(fields)
    d = HFConfig(fields, aliases=ALIASES, harmless=HARMLESS)
    d.only(
        hidden_act=SILU, attention_bias=(False,), mla_use_nope=(True,), moe_layer_freq=(1,),
        moe_router_activation_func=("sigmoid",), use_grouped_topk=(True,),
    )  # fmt: skip
    heads, nope, rope = (
        d.size(name) for name in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    d.agree(qk_head_dim=nope + rope)
    if d.size("num_key_value_heads", None) not in (None, heads):
        raise NotImplementedError(
            f"kimi_linear: num_key_value_heads must be num_attention_heads={heads}; "
            f"got {d['num_key_value_heads']}"
        )
    delta_heads, width = d.size("linear_num_heads", 32), d.size("linear_head_dim", 128)
    config = KimiLinearConfig(
        vocab_size=d.size("vocab_size"),
        num_layers=d.size("num_hidden_layers"),
        embed_dim=d.size("hidden_size"),
        num_heads=heads,
        latent=LatentDims(
            q_rank=d.size("q_lora_rank", None),
            kv_rank=d.size("kv_lora_rank"),
            nope_dim=nope,
            rope_dim=rope,
            value_dim=d.size("v_head_dim"),
        ),
        delta=DeltaDims(
            num_key_heads=delta_heads, num_value_heads=delta_heads, key_dim=width, value_dim=width,
            taps=d.size("linear_conv_kernel_dim", 4),
        ),
        mlp_dim=d.size("intermediate_size"),
        moe_dim=d.size("moe_intermediate_size"),
        num_experts=d.size("num_experts"),
        num_experts_per_tok=d.size("num_experts_per_token"),
        num_shared_experts=d.size("num_shared_experts", 1),
        first_dense_layers=_dense_layers(d),
        layer_pattern=_pattern(d, by_number),
        routing=Routing(
            normalise=d.flag("moe_renormalize", True),
            scale=d.number("routed_scaling_factor", 2.446),
            num_groups=d.size("num_expert_group", None) or 1,
            top_groups=d.size("topk_group", None) or 1,
        ),
        norm_eps=d.number("rms_norm_eps", 1e-5),
        tie_embeddings=d.flag("tie_word_embeddings", False),
        trained_positions=d.size("model_max_length", None),
        dtype=d.dtype(published="bfloat16"),
    )  # fmt: skip
    d.finish()
    return config


def _flat(fields: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Fields with those of `linear_attn_config` among them, and the pattern that it lists."""
    fields = dict(fields)
    nested = fields.pop("linear_attn_config", None)
    if nested is None:
        return fields, None
    if not isinstance(nested, Mapping):
        raise ValueError(f"kimi_linear: linear_attn_config must be an object; got {nested!r:.50}")
    if unknown := {k: v for k, v in nested.items() if k not in {**DELTA, **LAYERS}}:
        raise NotImplementedError(f"kimi_linear: linear_attn_config: not known are {unknown}")
    for key, name in DELTA.items():
        if key in nested and fields.setdefault(name, nested[key]) != nested[key]:
            raise ValueError(
                f"kimi_linear: {name}={fields[name]} and {key}={nested[key]} of "
                "linear_attn_config are one thing"
            )
    given = [key for key in LAYERS if key in nested]
    return fields, _listed(nested, fields.get("num_hidden_layers")) if given else None


def _listed(nested, layers) -> str:
    """The pattern of lists that number layers from 1."""
    kinds: dict[int, str] = {}
    for key, letter in LAYERS.items():
        for number in nested.get(key) or ():
            if kinds.setdefault(number, letter) != letter:
                raise ValueError(f"kimi_linear: layer {number} is in both lists of {list(LAYERS)}")
    if sorted(kinds) != list(range(1, layers + 1)):
        raise ValueError(
            f"kimi_linear: kda_layers and full_attn_layers must number {layers} layers from 1; "
            f"got {sorted(kinds)}"
        )
    return "".join(kinds[i + 1] for i in range(layers))


def _pattern(d: HFConfig, listed: str | None) -> str:
    layers = d.size("num_hidden_layers")
    types = d.kinds("layer_types", layers)
    if types is None:
        default = "".join("G" if i and i % 4 == 0 else "R" for i in range(layers))
        return shortest_cycle(default if listed is None else listed)
    if unknown := set(types) - KINDS.keys():
        raise NotImplementedError(
            f"kimi_linear: layer_types are of {list(KINDS)}; got {sorted(unknown)}"
        )
    pattern = "".join(KINDS[kind] for kind in types)
    if listed not in (None, pattern):
        raise ValueError(f"kimi_linear: layer_types and linear_attn_config must agree; got {types}")
    return shortest_cycle(pattern)


def _dense_layers(d: HFConfig) -> int:
    layers = d.size("num_hidden_layers")
    dense = d.leading("mlp_layer_types", layers, "dense", "sparse")
    if dense is None:
        return min(d.count("first_k_dense_replace", 1), layers)
    d.agree(first_k_dense_replace=dense)
    return dense


def write(config: KimiLinearConfig) -> dict[str, Any]:
    """Write the fields that `read` takes, as transformers names them."""
    c, kinds = config, {letter: kind for kind, letter in KINDS.items()}
    sparse = c.num_layers - c.first_dense_layers
    limit = {} if c.trained_positions is None else {"model_max_length": c.trained_positions}
    return limit | {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_heads,
        "q_lora_rank": c.latent.q_rank,
        "kv_lora_rank": c.latent.kv_rank,
        "qk_nope_head_dim": c.latent.nope_dim,
        "qk_rope_head_dim": c.latent.rope_dim,
        "v_head_dim": c.latent.value_dim,
        "mla_use_nope": True,
        "linear_num_heads": c.delta.num_value_heads,
        "linear_head_dim": c.delta.value_dim,
        "linear_conv_kernel_dim": c.delta.taps,
        "layer_types": [kinds[c.kind(i)] for i in range(c.num_layers)],
        "mlp_layer_types": ["dense"] * c.first_dense_layers + ["sparse"] * sparse,
        "intermediate_size": c.mlp_dim,
        "moe_intermediate_size": c.moe_dim,
        "num_experts": c.num_experts,
        "num_experts_per_token": c.num_experts_per_tok,
        "num_shared_experts": c.num_shared_experts,
        "moe_renormalize": c.routing.normalise,
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": c.routing.scale,
        "num_expert_group": c.routing.num_groups,
        "topk_group": c.routing.top_groups,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_act": "silu",
        "dtype": c.dtype,
        "pad_token_id": None,  # transformers' own default is beyond a smaller vocabulary
    }
