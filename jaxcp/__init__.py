# SPDX-License-Identifier: Apache-2.0
"""Long-context hybrid-MoE language models in JAX, the sequence spread over many chips.

Names are imported on first use, so that `import jaxcp` and `jaxcp --help` need no jax.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxcp.context_parallel import USP as USP
    from jaxcp.context_parallel import AllGather as AllGather
    from jaxcp.context_parallel import FixedOrder as FixedOrder
    from jaxcp.context_parallel import Ring as Ring
    from jaxcp.context_parallel import RingPassQ as RingPassQ
    from jaxcp.context_parallel import Ulysses as Ulysses
    from jaxcp.context_parallel import attention_fn as attention_fn
    from jaxcp.context_parallel import context_parallel_attention as context_parallel_attention
    from jaxcp.context_parallel import latent_attention as latent_attention
    from jaxcp.context_parallel import ring_attention as ring_attention
    from jaxcp.inference import Engine as Engine
    from jaxcp.inference import Sampling as Sampling
    from jaxcp.inference import decode_step as decode_step
    from jaxcp.inference import logits as logits
    from jaxcp.inference import prefill as prefill
    from jaxcp.layout import Balanced as Balanced
    from jaxcp.layout import Contiguous as Contiguous
    from jaxcp.layout import Striped as Striped
    from jaxcp.layout import Zigzag as Zigzag
    from jaxcp.mesh import MeshConfig as MeshConfig
    from jaxcp.mesh import emulate_devices as emulate_devices
    from jaxcp.mesh import make_mesh as make_mesh
    from jaxcp.models.deepseek.v3.config import DeepSeekV3Config as DeepSeekV3Config
    from jaxcp.models.deepseek.v3.model import DeepSeekV3 as DeepSeekV3
    from jaxcp.models.deepseek.v4.config import DeepSeekV4Config as DeepSeekV4Config
    from jaxcp.models.deepseek.v4.model import DeepSeekV4 as DeepSeekV4
    from jaxcp.models.dense.config import DenseConfig as DenseConfig
    from jaxcp.models.dense.model import DenseModel as DenseModel
    from jaxcp.models.gpt.config import GPTConfig as GPTConfig
    from jaxcp.models.gpt.model import GPT as GPT
    from jaxcp.models.hybrid_moe.config import HybridMoEConfig as HybridMoEConfig
    from jaxcp.models.hybrid_moe.model import HybridMoE as HybridMoE
    from jaxcp.models.kimi_linear.config import KimiLinearConfig as KimiLinearConfig
    from jaxcp.models.kimi_linear.model import KimiLinear as KimiLinear
    from jaxcp.models.qwen3_next.config import Qwen3NextConfig as Qwen3NextConfig
    from jaxcp.models.qwen3_next.model import Qwen3Next as Qwen3Next
    from jaxcp.sharding import Rules as Rules
    from jaxcp.training import LossConfig as LossConfig
    from jaxcp.training import OptimizerConfig as OptimizerConfig
    from jaxcp.training import TextSource as TextSource
    from jaxcp.training import TokenFiles as TokenFiles
    from jaxcp.training import TrainConfig as TrainConfig
    from jaxcp.training import train as train
    from jaxcp.weights import abstract_model as abstract_model
    from jaxcp.weights import load as load
    from jaxcp.weights import load_config as load_config
    from jaxcp.weights import save as save

_HOME = {
    "jaxcp.context_parallel": (
        "USP", "AllGather", "FixedOrder", "Ring", "RingPassQ", "Ulysses",
        "attention_fn", "context_parallel_attention", "latent_attention", "ring_attention",
    ),
    "jaxcp.inference": ("Engine", "Sampling", "decode_step", "logits", "prefill"),
    "jaxcp.layout": ("Balanced", "Contiguous", "Striped", "Zigzag"),
    "jaxcp.mesh": ("MeshConfig", "emulate_devices", "make_mesh"),
    "jaxcp.models.deepseek.v3.config": ("DeepSeekV3Config",),
    "jaxcp.models.deepseek.v3.model": ("DeepSeekV3",),
    "jaxcp.models.deepseek.v4.config": ("DeepSeekV4Config",),
    "jaxcp.models.deepseek.v4.model": ("DeepSeekV4",),
    "jaxcp.models.dense.config": ("DenseConfig",),
    "jaxcp.models.dense.model": ("DenseModel",),
    "jaxcp.models.gpt.config": ("GPTConfig",),
    "jaxcp.models.gpt.model": ("GPT",),
    "jaxcp.models.hybrid_moe.config": ("HybridMoEConfig",),
    "jaxcp.models.hybrid_moe.model": ("HybridMoE",),
    "jaxcp.models.kimi_linear.config": ("KimiLinearConfig",),
    "jaxcp.models.kimi_linear.model": ("KimiLinear",),
    "jaxcp.models.qwen3_next.config": ("Qwen3NextConfig",),
    "jaxcp.models.qwen3_next.model": ("Qwen3Next",),
    "jaxcp.sharding": ("Rules",),
    "jaxcp.training": (
        "LossConfig",
        "OptimizerConfig",
        "TextSource",
        "TokenFiles",
        "TrainConfig",
        "train",
    ),
    "jaxcp.weights": ("abstract_model", "load", "load_config", "save"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def _version() -> str:
    try:
        return metadata.version("jaxcp")
    except metadata.PackageNotFoundError:  # sources that were never installed
        return "0+unknown"


def __getattr__(name: str):
    if name == "__version__":
        return _version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'jaxcp' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__():
    return [*__all__, "__version__"]
