# SPDX-License-Identifier: Apache-2.0
"""config.json of Llama, Mistral, Qwen2 and Qwen3, in both directions.

Where a field is not there, it is what transformers takes then: a window of 4096 for a Mistral that
names none, but none for a Qwen without `use_sliding_window`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxcp.layers.rope import Rope
from jaxcp.models.dense.config import DenseConfig
from jaxcp.models.hf_config import SILU, HFConfig, shortest_cycle

KINDS = {"full_attention": "G", "sliding_attention": "L"}


def _all_full(d: HFConfig) -> dict[str, Any]:
    return _of_all(d, None)


def _all_windowed(d: HFConfig) -> dict[str, Any]:
    return _of_all(d, _window(d))


def _of_all(d: HFConfig, window: int | None) -> dict[str, Any]:
    """Window fields of a model whose layers are alike; raises where `layer_types` says else."""
    kind = "full_attention" if window is None else "sliding_attention"
    types = d.kinds("layer_types", d.size("num_hidden_layers"))
    if types is not None and set(types) != {kind}:
        raise NotImplementedError(
            f"{d.model_type}: all layers are {kind} by the other fields; got layer_types={types}"
        )
    return {"layer_pattern": KINDS[kind], "window": window}


def _by_layer(d: HFConfig) -> dict[str, Any]:
    """Window fields of a Qwen, whose layers from `max_window_layers` on have a window."""
    layers, first = d.size("num_hidden_layers"), d.count("max_window_layers", 28)
    window = _window(d) if d.flag("use_sliding_window", False) else None
    d.get("sliding_window")  # says nothing without use_sliding_window
    types = d.kinds("layer_types", layers)
    if types is None:
        full = layers if window is None else min(first, layers)
        pattern = "G" * full + "L" * (layers - full)
    elif unknown := set(types) - KINDS.keys():
        raise NotImplementedError(
            f"{d.model_type}: layer_types are of {list(KINDS)}; got {sorted(unknown)}"
        )
    else:
        pattern = "".join(KINDS[kind] for kind in types)
    if "L" in pattern and window is None:
        raise ValueError(
            f"{d.model_type}: layer_types has sliding_attention, which needs use_sliding_window "
            f"and sliding_window; got {d.get('use_sliding_window')} and {d.get('sliding_window')}"
        )
    window = window if "L" in pattern else None
    return {"layer_pattern": shortest_cycle(pattern), "window": window}


def _window(d: HFConfig) -> int | None:
    return d.size("sliding_window", None) if "sliding_window" in d else 4096


def _qwen2_biases(d: HFConfig) -> dict[str, Any]:
    d.only(attention_bias=(True,))
    return {"qkv_bias": True}


def _mistral_biases(d: HFConfig) -> dict[str, Any]:
    d.only(attention_bias=(False,))
    return {}


def _qwen3_biases(d: HFConfig) -> dict[str, Any]:
    has_bias = d.flag("attention_bias", False)
    return {"qkv_bias": has_bias, "output_bias": has_bias}


def _llama_biases(d: HFConfig) -> dict[str, Any]:
    return _qwen3_biases(d) | {"mlp_bias": d.flag("mlp_bias", False)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Format:
    """Form of the config.json of one model_type; `windows` and `biases` read it."""

    architecture: str
    windows: Callable[[HFConfig], dict[str, Any]]
    biases: Callable[[HFConfig], dict[str, Any]]
    written: Callable[[DenseConfig], dict[str, Any]]
    qk_norm: bool = False
    head_dim: int | None = None
    """Channels of a head where a file has none; None: `hidden_size` divided by heads."""


def _window_fields(c: DenseConfig) -> dict[str, Any]:
    kinds = [c.kind(i) for i in range(c.num_layers)]
    types = {letter: kind for kind, letter in KINDS.items()}
    return {
        "use_sliding_window": "L" in kinds,
        "sliding_window": c.window if "L" in kinds else None,
        "max_window_layers": kinds.index("L") if "L" in kinds else c.num_layers,
        "layer_types": [types[kind] for kind in kinds],
    }


FORMATS = {
    "llama": _Format(
        architecture="LlamaForCausalLM",
        windows=_all_full,
        biases=_llama_biases,
        written=lambda c: {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias},
    ),
    "mistral": _Format(
        architecture="MistralForCausalLM",
        windows=_all_windowed,
        biases=_mistral_biases,
        written=lambda c: {"sliding_window": c.window},
    ),
    "qwen2": _Format(
        architecture="Qwen2ForCausalLM",
        windows=_by_layer,
        biases=_qwen2_biases,
        written=_window_fields,
    ),
    "qwen3": _Format(
        architecture="Qwen3ForCausalLM",
        windows=_by_layer,
        biases=_qwen3_biases,
        written=lambda c: _window_fields(c) | {"attention_bias": c.qkv_bias},
        qk_norm=True,
        head_dim=128,
    ),
}


def read(fields: Mapping[str, Any]) -> DenseConfig:
    """Read a `config.json` of model_type llama, mistral, qwen2 or qwen3.

    Raises:
      KeyError: a field that decides what is computed is not there.
      NotImplementedError: a field that changes what the model computes and is not known here.
      ValueError: fields that contradict each other.
    """
    d = HFConfig(fields)
    format = FORMATS[d.model_type]
    d.only(hidden_act=SILU)
    heads = d.size("num_attention_heads")
    config = DenseConfig(
        vocab_size=d.size("vocab_size"),
        num_layers=d.size("num_hidden_layers"),
        embed_dim=d.size("hidden_size"),
        num_heads=heads,
        num_kv_heads=_kv_heads(d, heads),
        head_dim=_head_dim(d, heads, format.head_dim),
        mlp_dim=d.size("intermediate_size"),
        rope=Rope.from_hf(d),
        qk_norm=format.qk_norm,
        norm_eps=d.number("rms_norm_eps", 1e-6),
        tie_embeddings=d.flag("tie_word_embeddings", False),
        trained_positions=d.size("max_position_embeddings", None),
        dtype=d.dtype(published="bfloat16"),
        **format.windows(d),
        **format.biases(d),
    )
    d.finish()
    return config


def _kv_heads(d: HFConfig, heads: int) -> int:
    """Llama of before grouped queries does not have the field; others' defaults fit no model."""
    if "num_key_value_heads" not in d and d.model_type != "llama":
        raise KeyError("num_key_value_heads")
    return d.size("num_key_value_heads", None) or heads


def _head_dim(d: HFConfig, heads: int, default: int | None) -> int:
    given = d.size("head_dim", None) if "head_dim" in d else default
    width = d.size("hidden_size")
    if given is None and width % heads:
        raise ValueError(
            f"{d.model_type}: num_attention_heads must divide hidden_size where there is no "
            f"head_dim; got {heads} and {width}"
        )
    return given or width // heads


def write(config: DenseConfig) -> dict[str, Any]:
    """Write the fields that `read` takes, in the first format that can express `config`.

    A Mistral without a window is a Llama.

    Raises:
      NotImplementedError: none of the four can.
    """
    kinds = "".join(config.kind(i) for i in range(config.num_layers))
    wanted = dataclasses.replace(
        config,
        layer_pattern=shortest_cycle(kinds),
        window=config.window if "L" in kinds else None,
        remat=False,
    )
    for model_type, format in FORMATS.items():
        fields = _common(wanted) | {
            "architectures": [format.architecture],
            "model_type": model_type,
            **format.written(wanted),
        }
        if read(fields) == wanted:
            return fields
    features = {name: getattr(wanted, name) for name in _FEATURES}
    raise NotImplementedError(
        f"a config.json of {', '.join(FORMATS)} cannot say {features}. Llama has no window and all "
        "or none of attention's biases, Mistral a window in all layers and no bias, Qwen2 qkv_bias "
        "alone, Qwen3 qk_norm and all or none of attention's biases"
    )


_FEATURES = "layer_pattern", "rope", "qk_norm", "qkv_bias", "output_bias", "mlp_bias"


def _common(c: DenseConfig) -> dict[str, Any]:
    limit = {} if c.trained_positions is None else {"max_position_embeddings": c.trained_positions}
    return limit | {
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_dim,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": c.rope.to_hf(),
        "hidden_act": "silu",
        "tie_word_embeddings": c.tie_embeddings,
        "dtype": c.dtype,
    }
