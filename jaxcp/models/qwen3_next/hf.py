# SPDX-License-Identifier: Apache-2.0
"""config.json of Qwen3-Next and Qwen3.5, in both directions.

Where a field is not there, it is what transformers takes then. Of a Qwen3.5 that also sees
pictures the text part is read; what is written then is the config.json of a text model.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from jaxcp.layers.gated_delta import DeltaDims
from jaxcp.layers.rope import Rope
from jaxcp.models.hf_config import SILU, HFConfig, shortest_cycle
from jaxcp.models.qwen3_next.config import Qwen3NextConfig, SparseConfig

log = logging.getLogger(__name__)

KINDS = {"linear_attention": "R", "full_attention": "G"}
PART = 0.25
DRAFTS, DRAFTS_OF_NEXT = "mtp_num_hidden_layers", "num_nextn_predict_layers"
"""Fields that count layers that draft: of Qwen3.5; and what vLLM asks of Qwen3-Next, whose
published files have none."""
SEEING = {"qwen3_5_moe": "qwen3_5_moe_text", "qwen3_5": "qwen3_5_text"}
"""Formats with a `text_config` in them, and that of the text alone."""
OF_PICTURES = (
    "vision_config", "image_token_id", "video_token_id", "vision_start_token_id",
    "vision_end_token_id",
)  # fmt: skip
MROPE = "mrope_section", "mrope_interleaved"


def read(fields: Mapping[str, Any]) -> Qwen3NextConfig:
    """Read a `config.json` of model_type qwen3_next, qwen3_5_moe, qwen3_5, or the last two's text.

    Raises:
      KeyError: a field that decides what is computed is not there.
      NotImplementedError: a field that changes what the model computes and is not known here.
      ValueError: fields that contradict each other.
    """
    if fields["model_type"] in SEEING:
        fields = _text_of(fields)
    d = HFConfig(_without_sections(fields), aliases={DRAFTS_OF_NEXT: DRAFTS})
    d.only(
        hidden_act=SILU, mamba_ssm_dtype=("float32",), attn_output_gate=(True,),
        mtp_use_dedicated_embeddings=(False,),
    )  # fmt: skip
    config = Qwen3NextConfig(
        vocab_size=d.size("vocab_size"),
        num_layers=d.size("num_hidden_layers"),
        embed_dim=d.size("hidden_size"),
        num_heads=d.size("num_attention_heads"),
        num_kv_heads=d.size("num_key_value_heads"),
        head_dim=d.size("head_dim", 256),
        delta=_delta(d),
        rope=Rope.from_hf(d, part=PART),
        layer_pattern=_pattern(d),
        attention_bias=d.flag("attention_bias", False),
        num_mtp_layers=d.count(DRAFTS, None),
        norm_eps=d.number("rms_norm_eps", 1e-6),
        tie_embeddings=d.flag("tie_word_embeddings", False),
        trained_positions=d.size("max_position_embeddings", None),
        format=d.model_type,
        dtype=d.dtype(published="bfloat16"),
        **MLPS[d.model_type](d),
    )
    d.finish()
    return config


def _text_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the text part, with what the whole says of it."""
    model_type = fields["model_type"]
    text = fields["text_config"]
    if not isinstance(text, Mapping):
        raise ValueError(f"{model_type}: text_config must be an object; got {text!r:.50}")
    if text.get("model_type", SEEING[model_type]) not in (model_type, SEEING[model_type]):
        raise NotImplementedError(
            f"{model_type}: text_config is of {SEEING[model_type]}; got {text['model_type']!r}"
        )
    whole = {k: v for k, v in fields.items() if k not in ("text_config", *OF_PICTURES)}
    for key, value in text.items():
        if key == "tie_word_embeddings" and whole.setdefault(key, value) != value:
            raise ValueError(
                f"{model_type}: tie_word_embeddings must be one thing; got {whole[key]} and "
                f"{value} in text_config"
            )
    if "vision_config" in fields:
        log.info("%s: the text part is read, the part that sees pictures is not", model_type)
    return whole | dict(text) | {"model_type": SEEING[model_type]}


def _without_sections(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields without those that part the channels among time, height and width.

    Text has one position for the three, so that all parts turn alike.
    """
    fields = dict(fields)
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name)
        if fields["model_type"] == "qwen3_next" or not isinstance(rope, Mapping):
            continue
        if rope.get("mrope_interleaved", True) is not True:
            raise NotImplementedError(
                f"{fields['model_type']}: mrope_interleaved must be true; "
                f"got {rope['mrope_interleaved']!r}"
            )
        fields[name] = {key: value for key, value in rope.items() if key not in MROPE}
    return fields


def _delta(d: HFConfig) -> DeltaDims:
    return DeltaDims(
        num_key_heads=d.size("linear_num_key_heads", 16),
        num_value_heads=d.size("linear_num_value_heads", 32),
        key_dim=d.size("linear_key_head_dim", 128),
        value_dim=d.size("linear_value_head_dim", 128),
        taps=d.size("linear_conv_kernel_dim", 4),
    )


def _pattern(d: HFConfig) -> str:
    layers = d.size("num_hidden_layers")
    types = d.kinds("layer_types", layers)
    interval = d.size("full_attention_interval", 4)
    counted = "".join("RG"[(i + 1) % interval == 0] for i in range(layers))
    if types is None:
        return shortest_cycle(counted)
    if unknown := set(types) - KINDS.keys():
        raise NotImplementedError(
            f"{d.model_type}: layer_types are of {list(KINDS)}; got {sorted(unknown)}"
        )
    pattern = "".join(KINDS[kind] for kind in types)
    if "full_attention_interval" in d and pattern != counted:
        raise ValueError(
            f"{d.model_type}: full_attention_interval={interval} and layer_types must agree; "
            f"got {types}"
        )
    return shortest_cycle(pattern)


def _sparse(d: HFConfig, normalise: bool) -> SparseConfig:
    return SparseConfig(
        count=d.size("num_experts"),
        per_tok=d.size("num_experts_per_tok"),
        dim=d.size("moe_intermediate_size"),
        shared_dim=d.size("shared_expert_intermediate_size"),
        normalise=normalise,
    )


def _mixed(d: HFConfig) -> dict[str, Any]:
    """MLPs of Qwen3-Next, some of which may be dense."""
    layers, step = d.size("num_hidden_layers"), d.size("decoder_sparse_step", 1)
    dense, count = d.places("mlp_only_layers") or [], d.count("num_experts")
    sparse = [count > 0 and i not in dense and (i + 1) % step == 0 for i in range(layers)]
    pattern = "".join("DE"[is_sparse] for is_sparse in sparse)
    width = d.size("intermediate_size", None)
    normalise = d.flag("norm_topk_prob", True)
    if "E" not in pattern:
        for name in ("num_experts_per_tok", "moe_intermediate_size"):
            d.get(name)
        d.get("shared_expert_intermediate_size")
    return {
        "mlp_pattern": shortest_cycle(pattern),
        "mlp_dim": width if "D" in pattern else None,
        "experts": _sparse(d, normalise) if "E" in pattern else None,
    }


def _all_sparse(d: HFConfig) -> dict[str, Any]:
    d.only(mlp_only_layers=([], None), norm_topk_prob=(True,), decoder_sparse_step=(1,))
    d.get("intermediate_size")  # of no layer
    return {"experts": _sparse(d, True)}


def _all_dense(d: HFConfig) -> dict[str, Any]:
    d.only(mlp_only_layers=([], None))
    return {"mlp_pattern": "D", "mlp_dim": d.size("intermediate_size")}


MLPS: dict[str, Callable[[HFConfig], dict[str, Any]]] = {
    "qwen3_next": _mixed,
    "qwen3_5_moe_text": _all_sparse,
    "qwen3_5_text": _all_dense,
}
ARCHITECTURES = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}


def write(config: Qwen3NextConfig) -> dict[str, Any]:
    """Write the fields that `read` takes.

    Raises:
      NotImplementedError: the format has no field for what the configuration says.
    """
    c, kinds = config, {letter: kind for kind, letter in KINDS.items()}
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[c.format]],
        "model_type": c.format,
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "linear_num_key_heads": c.delta.num_key_heads,
        "linear_num_value_heads": c.delta.num_value_heads,
        "linear_key_head_dim": c.delta.key_dim,
        "linear_value_head_dim": c.delta.value_dim,
        "linear_conv_kernel_dim": c.delta.taps,
        "layer_types": [kinds[c.kind(i)] for i in range(c.num_layers)],
        "rope_parameters": c.rope.to_hf() | {"partial_rotary_factor": c.rope.part},
        "attention_bias": c.attention_bias,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_act": "silu",
        "dtype": c.dtype,
    }
    if c.trained_positions is not None:
        fields["max_position_embeddings"] = c.trained_positions
    if c.num_mtp_layers is not None:
        fields[DRAFTS_OF_NEXT if c.format == "qwen3_next" else DRAFTS] = c.num_mtp_layers
    fields |= _mlp_fields(c)
    again = read(fields)
    if any(again.kind(i) != c.kind(i) for i in range(c.num_layers)) or (
        [again.is_sparse(i) for i in range(c.num_layers)]
        != [c.is_sparse(i) for i in range(c.num_layers)]
        or again.experts != c.experts
    ):
        raise NotImplementedError(
            f"a config.json of {c.format} cannot say mlp_pattern={c.mlp_pattern!r} with {c.experts}"
        )
    return fields


def _mlp_fields(c: Qwen3NextConfig) -> dict[str, Any]:
    sparse = [c.is_sparse(i) for i in range(c.num_layers)]
    fields: dict[str, Any] = {} if c.mlp_dim is None else {"intermediate_size": c.mlp_dim}
    if c.format == "qwen3_next":
        fields |= {
            "mlp_only_layers": [i for i, is_sparse in enumerate(sparse) if not is_sparse],
            "decoder_sparse_step": 1,
            "num_experts": c.num_experts,
        }
    if c.experts is not None and c.format != "qwen3_5_text":
        fields |= {
            "num_experts": c.experts.count,
            "num_experts_per_tok": c.experts.per_tok,
            "moe_intermediate_size": c.experts.dim,
            "shared_expert_intermediate_size": c.experts.shared_dim,
            "norm_topk_prob": c.experts.normalise,
        }
    return fields
