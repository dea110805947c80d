# SPDX-License-Identifier: Apache-2.0
"""Places where a run begins: weights of a checkpoint, the state of another run, its own old end."""

import dataclasses
import json
import pathlib
from typing import Any

from jaxcp.input_files import JSON_BYTES, read_bytes
from jaxcp.sharding import Rules
from jaxcp.training import checkpoint
from jaxcp.training.config import StartConfig, TrainConfig
from jaxcp.training.identity import differences, plain
from jaxcp.training.optimizer import schedule
from jaxcp.weights import load, load_config

OF_COMPUTING = ("dtype", "remat", "reproducible_experts")
"""Fields of a model's config that say in what way it computes, not what it is."""

CONFIG, CHECKPOINTS = "config.json", "checkpoints"


def load_weights(model_config: Any, folder: str, *, rules: Rules) -> Any:
    """Load the model of a checkpoint in float32, on the mesh in scope.

    Raises:
      ValueError: it is another model than `model_config`, naming the fields; or what `load` raises.
    """
    theirs, ours = (_architecture(config) for config in (load_config(folder), model_config))
    if lines := differences(theirs, ours):
        raise ValueError(
            f"the model of {folder} is another than the run's: {'; '.join(lines)}. Give the run "
            "the model of the checkpoint (`jaxcp train --init-from` does)"
        )
    return load(folder, dtype="float32", rules=rules)[0]


def from_checkpoint(config: TrainConfig, folder: str) -> TrainConfig:
    """Make a run start from the weights of a checkpoint, with its model.

    The way in which the run's own model computes stays, where both are of one family.
    """
    model = load_config(folder)
    if type(model) is type(config.model):
        names = {field.name for field in dataclasses.fields(model)} & {*OF_COMPUTING}
        model = dataclasses.replace(model, **{name: getattr(config.model, name) for name in names})
    return dataclasses.replace(config, model=model, start=StartConfig(weights=folder))


def lengthened(config: TrainConfig, steps: int) -> TrainConfig:
    """Make the finished run in `config.out_dir` longer: its schedule begins anew where it ended.

    A run that was already made so long goes on as it is.

    Raises:
      ValueError: there is no run, it is not at its end, or it has `steps` steps or more.
    """
    recorded = read_identity(pathlib.Path(config.out_dir))
    former, before = recorded.get("steps"), tuple(recorded.get("extended", ()))
    if not isinstance(former, int) or former > steps or (former == steps and not before):
        raise ValueError(
            f"needed a run of less than {steps} steps in {config.out_dir}; got {former}"
        )
    saved = checkpoint.steps(pathlib.Path(config.out_dir) / CHECKPOINTS)
    if former != steps and former not in saved:
        raise ValueError(
            f"needed a finished run in {config.out_dir}, a checkpoint at step {former}; it has "
            f"{saved}. Finish it first, or train with another steps from the start"
        )
    extended = before if former == steps else (*before, former)
    return dataclasses.replace(config, steps=steps, extended=extended)


def cooled(
    config: TrainConfig, steps: int, out_dir: str | pathlib.Path, step: int | None = None
) -> TrainConfig:
    """Make a run that goes on from a flat part of the one in `config.out_dir`, down to a rate of 0.

    Its numbers are those of a run that was planned to end there.

    Args:
      steps: of the cool-down, which is linear (`optimizer.decay="sqrt"` stays that).
      out_dir: the folder of the new run.
      step: the checkpoint from which it goes on; None takes the newest.
    Raises:
      ValueError: no such checkpoint, or the rate is not at its peak there.
    """
    saved = checkpoint.steps(pathlib.Path(config.out_dir) / CHECKPOINTS)
    if step is None:
        step = saved[-1] if saved else None
    if step not in saved:
        raise ValueError(f"needed a checkpoint in {config.out_dir}: {saved}; got step={step}")
    assert step is not None
    rate = float(schedule(config.optimizer, 1.0, config.cycles)(step - 1))
    if rate != 1.0:
        raise ValueError(
            f"a cool-down goes on from a flat part; at step {step} the rate is {rate:.3g} of its "
            f"peak. Take an earlier one of {saved}, or a run with decay_fraction=0"
        )
    optimizer = dataclasses.replace(
        config.optimizer,
        decay="sqrt" if config.optimizer.decay == "sqrt" else "linear",
        decay_fraction=steps / (step + steps),
        final_fraction=0.0,
    )
    return dataclasses.replace(
        config,
        steps=step + steps,
        extended=(),
        optimizer=optimizer,
        start=StartConfig(run=str(config.out_dir), step=step),
        out_dir=out_dir,
    )


def read_identity(out_dir: pathlib.Path) -> dict[str, Any]:
    """Read which run a folder holds, as `identity` describes it.

    Raises:
      ValueError: there is none, or it cannot be read.
    """
    path = out_dir / CONFIG
    try:
        fields = json.loads(read_bytes(path, JSON_BYTES))  # with Infinity, where a run has it
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise ValueError(f"needed the configuration of a run; got {path}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"needed the configuration of a run; got {path} with no object")
    return fields


def _architecture(model_config: Any) -> dict[str, Any]:
    fields = plain(model_config, everything=True)
    return {name: value for name, value in fields.items() if name not in OF_COMPUTING}
