# SPDX-License-Identifier: Apache-2.0
"""Writes the model of a finished run as a checkpoint folder that `jaxcp.load` reads."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import process_allgather

from jaxcp import processes
from jaxcp.data.sources import as_source
from jaxcp.training import checkpoint
from jaxcp.training.config import StartConfig, TrainConfig
from jaxcp.training.loop import BEST, Result, mesh_of
from jaxcp.training.step import init_state, join
from jaxcp.training.tokens import separator_of, tokenizer_of
from jaxcp.weights import save


def export_run(
    result: Result,
    config: TrainConfig,
    folder: pathlib.Path,
    *,
    dtype: str = "float32",
    of: Literal["last", "best"] = "last",
) -> pathlib.Path:
    """Write config.json and safetensors of a run's parameters, rounded to `dtype`.

    The tokenizer of the data goes with them, so that the checkpoint talks, here and in
    transformers; its separator ends an answer. Of several processes all call this, and the first
    one writes; its host then holds the whole model.

    Args:
      of: the last step, or the best evaluation.
    Raises:
      ValueError: the best of a run that was not evaluated.
    """

    def rounded(variable):
        if not isinstance(variable, nnx.Param):  # the router's selection bias stays float32
            return variable
        return variable.replace(variable.get_value().astype(jnp.dtype(dtype)))

    model = result.model if of == "last" else best_model(result, config)
    model = jax.tree.map(rounded, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    if processes.several():
        model = jax.tree.map(_on_this_host, model)
    processes.by_first(lambda: _write(model, config, folder))
    return folder


def _on_this_host(x: jax.Array) -> jax.Array:
    """Gather an array of all processes; those that do not write drop it again, one by one."""
    whole = process_allgather(x, tiled=True)
    if not processes.is_first():
        whole = np.zeros(0, whole.dtype)
    return jax.device_put(whole, jax.local_devices(backend="cpu")[0])


def _write(model: Any, config: TrainConfig, folder: pathlib.Path) -> None:
    source = as_source(config.data)
    tokenizer, separator = tokenizer_of(source, config.model.vocab_size), separator_of(source)
    if separator is not None:
        model.stop_tokens = (separator,)
    save(model, folder, tokenizer)
    if tokenizer is not None:
        # without it transformers makes GPT-2's own tokenizer of another's tokenizer.json, silently
        fields: dict[str, str | None] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if separator is not None:
            fields["eos_token"] = tokenizer.backend.id_to_token(separator)
        (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=1) + "\n")


def best_model(result: Result, config: TrainConfig) -> Any:
    """The model of a run as it was at its best evaluation, on the mesh of the run.

    Raises:
      ValueError: the run was not evaluated, or the state is gone.
    """
    if result.best_step is None:
        raise ValueError("the best of a run needs evaluations: set eval_every and eval_data")
    folder = pathlib.Path(config.out_dir) / BEST
    saved = processes.decide(checkpoint.steps(folder))
    if result.best_step not in saved:
        raise ValueError(
            f"the best evaluation was at step {result.best_step}; {folder} has {saved}. "
            "Evaluate again, or export the last step"
        )
    with jax.set_mesh(mesh_of(config)):
        fresh = init_state(dataclasses.replace(config, start=StartConfig()))
        state = checkpoint.read(folder, result.best_step, fresh)
        return join(config.at(result.best_step).model, state, config.gathered_to)
