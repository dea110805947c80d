# SPDX-License-Identifier: Apache-2.0
"""config.json of mixtures that no other format can say: our own fields, as they are."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from jaxcp.models.hf_config import HARMLESS_NAMES, HFConfig
from jaxcp.models.hybrid_moe.config import HybridMoEConfig

MODEL_TYPE = "jaxcp_hybrid_moe"
UNSAID = "remat", "reproducible_experts"
"""Fields that say how to compute, not what."""


def read(fields: Mapping[str, Any]) -> HybridMoEConfig:
    d = HFConfig(fields)
    given = {k: d[k] for k in d if k not in HARMLESS_NAMES}
    d.finish()
    try:
        return _made(HybridMoEConfig, given | {"attention": _attention(given)})
    except TypeError as error:
        raise ValueError(
            f"{MODEL_TYPE}: a field that is not known, not there, or of another type: {error}"
        ) from error


def _attention(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of attention; files of before `full` have `full_num_heads`."""
    attention = dict(given["attention"])
    count = attention.pop("full_num_heads", None)
    if count is None:
        return attention
    head_dim, sinks = given["head_dim"], attention.get("sinks", False)
    full = {"num_heads": count, "num_kv_heads": given["num_kv_heads"], "head_dim": head_dim}
    full |= {"value_dim": head_dim, "rope": attention.get("rope", {}), "sinks": sinks}
    return attention | {"full": full}


def write(c: HybridMoEConfig) -> dict[str, Any]:
    said = {k: v for k, v in dataclasses.asdict(c).items() if k not in UNSAID}
    return {"model_type": MODEL_TYPE, "architectures": ["JaxcpHybridMoE"], **said}


def _made(cls: Any, values: Mapping[str, Any]) -> Any:
    """`cls(**values)`, objects within too; TypeError where a value is not of its field's type."""
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    return cls(**{k: _typed(k, kinds[k], v) if k in kinds else v for k, v in values.items()})


def _typed(name: str, kind: Any, value: Any) -> Any:
    options = typing.get_args(kind) or (kind,)
    for cls in filter(dataclasses.is_dataclass, options):
        return None if value is None and kind is not cls else _made(cls, value)
    is_good = isinstance(value, int | float if kind is float else kind)
    if not is_good or (isinstance(value, bool) and bool not in options):
        raise TypeError(f"{name} must be {kind}; got {value!r}")
    return value
