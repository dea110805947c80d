# SPDX-License-Identifier: Apache-2.0
"""Writes the model of a finished run as a checkpoint folder that `jaxcp.load` reads."""

import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcp.data.sources import TokenFiles
from jaxcp.text.tokenizer import byte_level
from jaxcp.training.config import TrainConfig
from jaxcp.training.loop import Result
from jaxcp.weights import save


def export(
    result: Result, config: TrainConfig, folder: pathlib.Path, *, dtype: str = "float32"
) -> pathlib.Path:
    """Write config.json and safetensors of a run's final parameters, rounded to `dtype`.

    A run on bytes (any source but token files, 256 tokens) gets the byte-level tokenizer.json.
    """

    def rounded(variable):
        if not isinstance(variable, nnx.Param):  # the router's selection bias stays float32
            return variable
        return variable.replace(variable.get_value().astype(jnp.dtype(dtype)))

    model = jax.tree.map(rounded, result.model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    of_bytes = config.model.vocab_size == 256 and not isinstance(config.data, str | TokenFiles)
    save(model, folder, byte_level() if of_bytes else None)
    return folder
