# SPDX-License-Identifier: Apache-2.0
"""config.json of a hybrid MoE, in both directions: a format is a file of `formats`.

Where a field is not there, it is what transformers takes then. The published files and those
defaults differ (Hy3's `enable_moe_fp32_combine`, Qwen3's `norm_topk_prob`), so none is left to
chance: every field that matters is read, and written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxcp.models.hybrid_moe.config import HybridMoEConfig
from jaxcp.models.hybrid_moe.formats import (
    glm4_moe,
    gpt_oss,
    hy_v3,
    mimo_v2_flash,
    minimax_m2,
    ours,
    qwen3_moe,
)

FORMATS = {
    "hy_v3": hy_v3,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "glm4_moe": glm4_moe,
    "minimax_m2": minimax_m2,
    "mimo_v2_flash": mimo_v2_flash,
}


def read(fields: Mapping[str, Any]) -> HybridMoEConfig:
    """Read a `config.json` of a model_type of `FORMATS`, or one that `write` wrote.

    Raises:
      NotImplementedError: a field that changes what the model computes and is not known here.
      ValueError: fields that contradict each other.
    """
    return FORMATS.get(fields["model_type"], ours).read(fields)


def model_type(config: HybridMoEConfig) -> str:
    """Name the format that a configuration survives: one of `FORMATS`, or ours.

    No two of them say the same: Hy3 has all of attention's biases or none, GLM none of its output,
    MiniMax one norm of all heads, MiMo heads of their own for full layers.
    """
    plain = dataclasses.replace(config, remat=False, reproducible_experts=False)
    for name, format in FORMATS.items():
        try:
            again = format.read(format.write(plain))
        except (NotImplementedError, ValueError):
            continue
        if again == plain:
            return name
    return ours.MODEL_TYPE


def write(config: HybridMoEConfig) -> dict[str, Any]:
    """Write the fields that `read` takes, with the model_type that they came from.

    A mixture that no format can express gets a model_type of ours, jaxcp_hybrid_moe, which no other
    program takes for something else.
    """
    return FORMATS.get(model_type(config), ours).write(config)
