# SPDX-License-Identifier: Apache-2.0
"""Which matrix every weight of every family is to Muon: by logical axes, written out here."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxcp
from jaxcp.models.hybrid_moe.config import NGramConfig
from jaxcp.sharding import sharding_of
from jaxcp.training import OptimizerConfig
from jaxcp.training.muon import is_matrix, matrix_sizes
from jaxcp.training.optimizer import decays, make_optimizer
from jaxcp.training.step import skeleton

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures"
FOLDERS = sorted(path.name for path in FIXTURES.iterdir() if (path / "config.json").is_file())

# [matrices ; rows, which are summed over ; columns, which are written]
MUON = {
    "embed heads head_dim": "; embed ; heads head_dim",
    "embed kv_heads head_dim": "; embed ; kv_heads head_dim",
    "heads head_dim embed": "; heads head_dim ; embed",
    "embed mlp": "; embed ; mlp",
    "mlp embed": "; mlp ; embed",
    "experts embed mlp": "experts ; embed ; mlp",
    "experts mlp embed": "experts ; mlp ; embed",
    "embed choices": "; embed ; choices",
    "window ngram embed": "; window ngram ; embed",
    "parts embed embed": "; parts embed ; embed",
    "embed latent": "; embed ; latent",
    "latent heads head_dim": "; latent ; heads head_dim",
    "latent index_heads head_dim": "; latent ; index_heads head_dim",
    "embed head_dim": "; embed ; head_dim",
    "embed index_heads": "; embed ; index_heads",
    "embed heads": "; embed ; heads",
    "head_groups group_heads head_dim latent": "head_groups ; group_heads head_dim ; latent",
    "head_groups latent embed": "; head_groups latent ; embed",
    "embed embed": "; embed ; embed",
}
DECAYS_TOO = {"vocab embed", "embed vocab", "vocab ngram", "positions embed", "mixes embed"}
BIASES = {
    "heads head_dim", "kv_heads head_dim", "experts mlp", "choices embed", "places latent",
    "places heads head_dim", "places kv_heads head_dim",
}  # fmt: skip


def configs(folder):
    """The fixture's, with an MTP layer and with n-grams where its family has them."""
    config = jaxcp.load_config(FIXTURES / folder)
    more = {"num_mtp_layers": 1}, {"num_mtp_layers": 0, "ngram": NGramConfig(width=3)}
    found = [config]
    for fields in more:
        if all(hasattr(config, name) for name in fields):
            found.append(dataclasses.replace(config, **fields))
    return found


def shapes(config):
    """`(logical axes, shape)` of every weight, by name."""
    bones, model = skeleton(config), jaxcp.abstract_model(config)
    leaves = dict(zip(bones.names, jax.tree.leaves(model), strict=True))
    return {name: (axes, leaves[name].shape) for name, axes in bones.axes.items()}


def sizes(description, axes, shape):
    """Of a row of `MUON`: its axes lie in the order of the weight's."""
    parts = [part.split() for part in description.split(";")]
    assert [name for part in parts for name in part] == list(axes)
    left = list(shape)
    return tuple(math.prod(left.pop(0) for _ in part) for part in parts)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_weight_is_cut_as_its_axes_say(folder):
    weights = {name: x for config in configs(folder) for name, x in shapes(config).items()}
    for name, (axes, shape) in weights.items():
        assert len(axes) == len(shape), name
        layers = shape[0] if axes[0] == "layers" else 1
        own = axes[axes[0] == "layers" :]
        key = " ".join(map(str, own))
        if key in MUON:
            assert is_matrix(axes) and decays(axes), name
            count, rows, columns = sizes(MUON[key], own, shape[-len(own) :])
            assert matrix_sizes(axes, shape) == (layers * count, rows, columns), name
        elif key in DECAYS_TOO:
            assert not is_matrix(axes) and decays(axes), name
        else:
            assert key in BIASES or len(own) == 1, (name, axes, "which matrix is this?")
            assert not is_matrix(axes) and not decays(axes), name


def test_one_step_makes_every_matrix_of_an_indexer_orthogonal():
    weights = shapes(configs("deepseek-v32-tiny")[0])
    axes = {name: axes for name, (axes, _) in weights.items() if ".attention.index" in name}
    rng = np.random.default_rng(0)
    grads = {n: jnp.asarray(rng.normal(size=weights[n][1]), jnp.float32) for n in axes}
    made = OptimizerConfig(
        learning_rate=1.0, muon_learning_rate=1.0, weight_decay=0, warmup_steps=0, clip_norm=None
    )
    optimizer = make_optimizer(made, 10, axes)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(grads):
        updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
        return updates

    with jax.numpy_dtype_promotion("standard"):
        updates = step(grads)
    own = [name for name in axes if is_matrix(axes[name])]
    assert {name.rpartition(".")[2] for name in own} == {"q", "k", "weights"}
    for name in own:
        _, rows, columns = cut = matrix_sizes(axes[name], updates[name].shape)
        values = np.linalg.svd(np.asarray(updates[name]).reshape(cut), compute_uv=False)
        values = values / max(1, columns / rows) ** 0.5
        assert values.max() < 1.3 and np.median(values) > 0.6, name


def test_axes_that_do_not_say_which_matrix_are_refused():
    muon = OptimizerConfig(muon_learning_rate=0.02)
    for axes in (("embed", None), ("embed", "mlp", "latent")):
        with pytest.raises(NotImplementedError, match=r"which matrix layers\.0\.new is.*AdamW"):
            make_optimizer(muon, 10, {"layers.0.new": axes})
        make_optimizer(OptimizerConfig(), 10, {"layers.0.new": axes})


def test_groups_of_heads_lie_over_model():
    """The output projection of V4 lies as its heads do."""
    for axes in (
        ("head_groups", "group_heads", "head_dim", "latent"),
        ("head_groups", "latent", "embed"),
    ):
        variable = nnx.Param(jnp.zeros((2,) * len(axes)), axes=axes)
        assert sharding_of(variable) == P("model", *[None] * (len(axes) - 1))
