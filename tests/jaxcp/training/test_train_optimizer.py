# SPDX-License-Identifier: Apache-2.0
"""Schedules, what decays, and Muon's matrices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxcp.training import OptimizerConfig
from jaxcp.training.muon import is_matrix, orthogonalize
from jaxcp.training.optimizer import decays, make_optimizer, schedule

AXES = {
    "embed": ("vocab", "embed"),
    "layers.0.attention.q": ("embed", "heads", "head_dim"),
    "layers.0.attention.o": ("heads", "head_dim", "embed"),
    "layers.0.attention.q_bias": ("heads", "head_dim"),
    "layers.0.mlp.gate": ("experts", "embed", "mlp"),
    "layers.0.mlp.down": ("experts", "mlp", "embed"),
    "layers.0.mlp.shared.up": ("embed", "mlp"),
    "layers.0.mlp_norm.scale": ("embed",),
}


def weights(seed=0):
    """One of each kind, by the names and shapes that the models use."""
    shapes = {
        "embed": (50, 16),
        "layers.0.attention.q": (16, 2, 8),
        "layers.0.attention.o": (2, 8, 16),
        "layers.0.attention.q_bias": (2, 8),
        "layers.0.mlp.gate": (4, 16, 6),
        "layers.0.mlp.down": (4, 6, 16),
        "layers.0.mlp.shared.up": (16, 40),
        "layers.0.mlp_norm.scale": (16,),
    }
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }


def test_schedule_rises_holds_and_falls():
    config = OptimizerConfig(
        warmup_steps=10, decay="linear", decay_fraction=0.3, final_fraction=0.1
    )
    with jax.numpy_dtype_promotion("standard"):
        rate = [float(schedule(config, 2.0, 100)(step)) for step in range(101)]
    np.testing.assert_allclose(rate[:10], np.linspace(0.2, 2, 10), rtol=1e-6)
    np.testing.assert_allclose(rate[10:71], 2)
    np.testing.assert_allclose(rate[70:], np.linspace(2, 0.2, 31), rtol=1e-5)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 5), (100, 3), (1, 1)])
def test_a_short_run_has_a_schedule_too(warmup, steps):
    config = OptimizerConfig(warmup_steps=warmup)
    with jax.numpy_dtype_promotion("standard"):
        rate = [float(schedule(config, 1.0, steps)(step)) for step in range(steps)]
    assert all(0 < r <= 1 for r in rate)


def test_axes_say_what_decays_and_what_is_a_matrix():
    w = weights()
    assert {n for n in w if not decays(AXES[n])} == {
        "layers.0.attention.q_bias",
        "layers.0.mlp_norm.scale",
    }
    assert {n for n in w if not is_matrix(AXES[n])} == {
        "embed",
        "layers.0.attention.q_bias",
        "layers.0.mlp_norm.scale",
    }


def test_orthogonalize_sets_singular_values_near_one():
    updates = {name: x for name, x in weights().items() if is_matrix(AXES[name])}
    out = orthogonalize(updates, AXES)
    matrices = {
        "layers.0.attention.q": (1, 16, 16),
        "layers.0.attention.o": (1, 16, 16),
        "layers.0.mlp.gate": (4, 16, 6),  # every expert by itself
        "layers.0.mlp.down": (4, 6, 16),
        "layers.0.mlp.shared.up": (1, 16, 40),
    }
    for name, (m, rows, columns) in matrices.items():
        scale = max(1, columns / rows) ** 0.5
        values = np.linalg.svd(np.asarray(out[name]).reshape(m, rows, columns), compute_uv=False)
        assert (values / scale < 1.3).all() and np.median(values / scale) > 0.6, name
        u, _, v = np.linalg.svd(
            np.asarray(updates[name]).reshape(m, rows, columns), full_matrices=False
        )
        along = np.einsum(
            "mrc,mrc->m", np.asarray(out[name]).reshape(m, rows, columns) / scale, u @ v
        )
        assert (along > 0.7 * min(rows, columns)).all(), name


STACKED = {
    **AXES,
    "layers.attention.k": ("layers", "embed", "kv_heads", "head_dim"),
    "layers.mlp.up": ("layers", "experts", "embed", "mlp"),
}
CUTS = {
    "replicas": {},
    "experts": {"layers.0.mlp.gate": P("seq"), "layers.mlp.up": P(None, "seq")},
    "rows": {"layers.0.attention.q": P(("data", "seq")), "layers.mlp.up": P(None, None, "data")},
    "both sides": {"layers.0.attention.q": P("seq", "data"), "layers.0.mlp.shared.up": P(
        "data", "seq")},
    "within a side": {
        "layers.0.attention.q": P(None, "data", "seq"),
        "layers.0.attention.o": P(None, ("data", "seq")),
        "layers.attention.k": P(None, None, None, "seq"),
    },
    "all": {"layers.mlp.up": P(None, "seq", "data"), "layers.attention.k": P(None, "data", "seq")},
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_matrices_in_parts_become_orthogonal_as_whole_ones(mesh_of, cut):
    """Three layers, which eight devices do not divide."""
    rng = np.random.default_rng(1)
    updates = {name: np.asarray(x) for name, x in weights().items() if is_matrix(AXES[name])}
    for name, shape in {"attention.k": (3, 16, 4, 4), "mlp.up": (3, 4, 16, 6)}.items():
        updates[f"layers.{name}"] = rng.normal(size=shape).astype(np.float32)
    alone = orthogonalize({name: jnp.asarray(x) for name, x in updates.items()}, STACKED)
    mesh_of(seq=4, data=2)
    specs = {name: P(*CUTS[cut].get(name, P()), *[None] * 4) for name in updates}
    specs = {name: P(*specs[name][: x.ndim]) for name, x in updates.items()}
    parts = {name: jax.device_put(x, specs[name]) for name, x in updates.items()}
    spread = jax.jit(functools.partial(orthogonalize, axes=STACKED))(parts)
    for name in updates:
        assert jax.typeof(spread[name]).sharding.spec == specs[name]
        np.testing.assert_allclose(spread[name], alone[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("muon", [None, 0.05])
def test_both_go_downhill_and_only_matrices_decay(muon):
    config = OptimizerConfig(
        learning_rate=0.05, muon_learning_rate=muon, warmup_steps=0, clip_norm=None
    )
    target, params = weights(1), weights(0)

    def run(config, params, grad, steps):
        optimizer = make_optimizer(config, 60, AXES)
        state = optimizer.init(params)

        @jax.jit
        def step(params, state):
            updates, state = optimizer.update(grad(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(steps):
            params, state = step(params, state)
        return params

    def distance(a):
        return sum(float(jnp.sum((a[n] - target[n]) ** 2)) for n in a)

    decaying = dataclasses.replace(config, weight_decay=0.5)
    with jax.numpy_dtype_promotion("standard"):
        near = run(config, params, lambda p: {n: p[n] - target[n] for n in p}, 30)
        still = run(decaying, params, lambda p: jax.tree.map(jnp.zeros_like, p), 1)
    assert distance(near) < 0.5 * distance(params)
    for name, x in params.items():
        shrunk = float(jnp.sum(still[name] ** 2) / jnp.sum(x**2))
        assert shrunk < 0.99 if decays(AXES[name]) else shrunk == 1, name
