# SPDX-License-Identifier: Apache-2.0
"""The model families, by the `model_type` of their config.json. Imported on first use."""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
import dataclasses
import difflib
import importlib
import types
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
from flax import nnx

from jaxcp.models.weight_table import Row


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's package: `config`, `hf` (the config.json), `model` and `weights` (the names)."""

    package: str
    config: str
    model: str

    @property
    def config_class(self) -> Any:
        return getattr(importlib.import_module(f"{self.package}.config"), self.config)

    @property
    def model_class(self) -> Any:
        return getattr(importlib.import_module(f"{self.package}.model"), self.model)

    def read(self, fields: Mapping[str, Any]) -> Any:
        """Make a config of a config.json's fields."""
        return importlib.import_module(f"{self.package}.hf").read(fields)

    def write(self, config: Any) -> dict[str, Any]:
        """Make the config.json's fields of a config."""
        return importlib.import_module(f"{self.package}.hf").write(config)

    @property
    def weights(self) -> ModuleType:
        return importlib.import_module(f"{self.package}.weights")

    def table(self, config: Any) -> Sequence[Row]:
        """The tensors of a model: `weights.TABLE`, or `weights.table(config)` where they differ."""
        weights = self.weights
        return weights.table(config) if hasattr(weights, "table") else weights.TABLE

    def copies(self, config: Any) -> Mapping[str, str]:
        """Tensors that a checkpoint may hold again, and the leaf that they are.

        `weights.COPIES` are not written again; those of `weights.copies(config)` are.
        """
        weights = self.weights
        return weights.copies(config) if hasattr(weights, "copies") else weights.COPIES

    def fit(self, config: Any, names: Collection[str]) -> Any:
        """`config`, less what a checkpoint of these tensors may lack (`weights.fit`)."""
        weights = self.weights
        return weights.fit(config, names) if hasattr(weights, "fit") else config


FAMILIES = {
    "gpt2": Family("jaxcp.models.gpt", config="GPTConfig", model="GPT"),
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "kimi_k2"),
        Family("jaxcp.models.deepseek.v3", config="DeepSeekV3Config", model="DeepSeekV3"),
    ),
    "deepseek_v4": Family(
        "jaxcp.models.deepseek.v4", config="DeepSeekV4Config", model="DeepSeekV4"
    ),
    **dict.fromkeys(
        (
            "hy_v3",
            "qwen3_moe",
            "gpt_oss",
            "glm4_moe",
            "minimax_m2",
            "mimo_v2_flash",
            "jaxcp_hybrid_moe",
        ),
        Family("jaxcp.models.hybrid_moe", config="HybridMoEConfig", model="HybridMoE"),
    ),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3"),
        Family("jaxcp.models.dense", config="DenseConfig", model="DenseModel"),
    ),
    "kimi_linear": Family(
        "jaxcp.models.kimi_linear", config="KimiLinearConfig", model="KimiLinear"
    ),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_text"),
        Family("jaxcp.models.qwen3_next", config="Qwen3NextConfig", model="Qwen3Next"),
    ),
}

ARCHITECTURES = {
    "GPT2LMHeadModel": "gpt2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV32ForCausalLM": "deepseek_v32",
    "DeepseekV4ForCausalLM": "deepseek_v4",
    "HYV3ForCausalLM": "hy_v3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "GptOssForCausalLM": "gpt_oss",
    "Glm4MoeForCausalLM": "glm4_moe",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "MiMoV2FlashForCausalLM": "mimo_v2_flash",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "KimiLinearForCausalLM": "kimi_linear",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
}
"""Names that `architectures` has where a config.json is older than `model_type`."""


def family_of(config: Any) -> Family:
    """The family of a config object.

    Raises:
      ValueError: it is no config of a known family.
    """
    for family in FAMILIES.values():
        if type(config).__name__ == family.config and isinstance(config, family.config_class):
            return family
    known = ", ".join(dict.fromkeys(family.config for family in FAMILIES.values()))
    raise ValueError(f"needed a model config ({known}); got {type(config).__name__}")


def config_from_dict(fields: Mapping[str, Any]) -> Any:
    """The config object for the contents of a config.json.

    Raises:
      ValueError: the model_type is unknown, or a field that the family needs is not there.
    """
    model_type = fields.get("model_type") or _by_architecture(fields.get("architectures"))
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"needed a model_type that jaxcp knows ({', '.join(FAMILIES)}); got {model_type!r}. "
            f"{_near(fields)}. "
            "A new family is a folder in jaxcp/models and a line in jaxcp/models/__init__.py"
        )
    try:
        return FAMILIES[model_type].read({**fields, "model_type": model_type})
    except KeyError as error:
        raise ValueError(
            f"a {model_type} config needs the field {error}; it is not there"
        ) from error


def config_to_dict(config: Any) -> dict[str, Any]:
    """The contents of a config.json that `config_from_dict` reads as `config`.

    `remat` and `reproducible_experts`, which say how and not what to compute, are not in it.

    Raises:
      ValueError: a config of no family that jaxcp knows.
      NotImplementedError: the format of its family cannot express it.
    """
    return family_of(config).write(config)


def _near(fields: Mapping[str, Any]) -> str:
    """Say which families have a name near the model_type, or an architecture, of a file."""
    names = fields.get("architectures") or []
    words = [fields.get("model_type"), *(names if isinstance(names, list) else [])]
    known = {_plain(name): name for name in FAMILIES}
    close: dict[str, None] = {}
    for word in (_plain(word) for word in words if isinstance(word, str)):
        begin = [x for x in known if len(word) > 3 and (x.startswith(word) or word.startswith(x))]
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.7)
        close |= dict.fromkeys(known[name] for name in (*begin, *near))
    return f"Near it in name: {', '.join(close)}" if close else "None is near it in name"


def _plain(name: str) -> str:
    return name[:99].partition("For")[0].lower().replace("_", "").replace("-", "")


def _by_architecture(names: Any) -> str | None:
    """The one model_type that all known `names` are of."""
    names = names if isinstance(names, list) else []
    model_types = {ARCHITECTURES[x] for x in names if isinstance(x, str) and x in ARCHITECTURES}
    return model_types.pop() if len(model_types) == 1 else None


def abstract_model(config: Any) -> Any:
    """The model of `config` with `jax.ShapeDtypeStruct` leaves: to count or compile, not to run.

    Nothing is allocated, whatever the size.

    Raises:
      ValueError: a config of no family that jaxcp knows.

    >>> sum(x.size for x in jax.tree.leaves(jaxcp.abstract_model(jaxcp.load_config(path))))
    """
    model_class = family_of(config).model_class

    def build():
        # One key for all: nnx.Rngs counts its draws in a traced variable, and tracing that costs
        # the square of their number (20 s instead of 1 s for Hy3's 80 layers).
        key = jax.random.key(0)
        return model_class(config, rngs=types.SimpleNamespace(params=lambda: key))

    return nnx.eval_shape(build)
