# SPDX-License-Identifier: Apache-2.0
"""The fields of a run as JSON values: all of them, or those that decide its numbers."""

import dataclasses
import re
from typing import Any

from jaxcp.training.config import LossConfig, StartConfig, TrainConfig


def identity(config: TrainConfig) -> dict[str, Any]:
    """List what decides the numbers of a run, as JSON values.

    A checkpoint may only be continued by a config that agrees on these. Mesh, rules, strategy,
    logging and saving may change.
    """
    how = ("remat", "reproducible_experts")
    model = {key: value for key, value in plain(config.model).items() if key not in how}
    names = ["seq_len", "batch_size", "steps", "data", "optimizer", "seed"]
    # runs from before there were any may go on
    names += ["losses"] * (config.losses != LossConfig())
    names += ["start"] * (config.start != StartConfig())
    names += ["extended"] * bool(config.extended)
    names += ["context"] * bool(config.context)
    return {"model": model} | {name: plain(getattr(config, name)) for name in names}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """List `field: old -> new` for each leaf on which two identities differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _is_default(value: Any, field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING and getattr(value, field.name) == field.default


def plain(value: Any, *, everything: bool = False) -> Any:
    """Convert to JSON values: dataclasses by fields and type, others by repr less addresses.

    Args:
      everything: fields too that runs from before they were there have not, and that are as these
        were (`data.sources.LATER`).
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: plain(getattr(value, field.name), everything=everything)
            for field in dataclasses.fields(value)
            if everything or not (field.metadata.get("later") and _is_default(value, field))
        }
        return {"type": type(value).__name__} | fields
    if isinstance(value, dict):
        return {str(key): plain(x, everything=everything) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x, everything=everything) for x in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
