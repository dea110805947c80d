# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in tests/fixtures, and broken ones made of them."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxcp import abstract_model

FIXTURES = Path(__file__).parents[0] / "fixtures"


def flat(model):
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, keys)): leaf.get_value() for keys, leaf in state}


def assert_same(a, b):
    """Two models have the same leaves: names, dtypes and bits."""
    chex.assert_trees_all_equal(flat(a), flat(b), strict=True)


def tensors(name):
    return load_file(FIXTURES / name / "model.safetensors")


def write(folder, name, contents, **config):
    """A checkpoint with the fixture's config.json, fields changed, and these tensors."""
    folder.mkdir(exist_ok=True)
    fields = json.loads((FIXTURES / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | config))
    save_file(
        {k: np.ascontiguousarray(v) for k, v in contents.items()}, folder / "model.safetensors"
    )
    return folder


def random_model(config, seed=0):
    """A model whose every leaf is random, biases too; norms are near one."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = rng.normal(scale=leaf.shape[0] ** -0.5, size=leaf.shape)
        return jnp.asarray(noise + ("scale" in jax.tree_util.keystr(path)), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_model(config))
