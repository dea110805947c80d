# SPDX-License-Identifier: Apache-2.0
"""A step whose gradients are not finite changes nothing of a state in parts, and is counted."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from test_stopping import Spoilt, run
from test_zero import GPT, HY3, batch_of, config, program

from jaxcp.data.placing import put
from jaxcp.layout import Zigzag
from jaxcp.mesh import MeshConfig
from jaxcp.training import read_metrics, train
from jaxcp.training.step import init_state

SPREAD = {"data": 2, "seq": 2}


def spoilt(c, step):
    """A batch, of which one token of one row has a weight that is not finite."""
    batch = batch_of(c, step)
    weights = batch["weights"].copy()
    weights[6, 9] = np.inf
    return batch | {"weights": weights}


def schedules(tree):
    """The counts of steps that place a state in its schedule, which go on."""
    kind = optax.ScaleByScheduleState
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [int(x.count) for x in leaves if isinstance(x, kind)]


def without_schedules(tree):
    kind = optax.ScaleByScheduleState
    cut = jax.tree.map(
        lambda x: None if isinstance(x, kind) else x, tree, is_leaf=lambda x: isinstance(x, kind)
    )
    return jax.tree_util.tree_leaves_with_path(cut)


@pytest.mark.parametrize(
    ("model", "zero", "muon"),
    [
        pytest.param(GPT, 1, None, marks=pytest.mark.slow),
        (GPT, 3, None),
        pytest.param(HY3, 1, 0.02, marks=pytest.mark.slow),
        pytest.param(HY3, 3, None, marks=pytest.mark.slow),
    ],
    ids=["gpt-1", "gpt-3", "hy3-1-muon", "hy3-3"],
)
def test_the_state_keeps_every_bit_and_its_place(model, zero, muon):
    c = config(model, mesh=SPREAD, zero=zero, accumulate=2, muon=muon)
    mesh, advance = c.mesh.make(jax.devices()[: c.mesh.size]), program(c)

    def placed(host):
        return put(host, mesh=mesh, layout=Zigzag(), accumulate=c.accumulate)

    with jax.set_mesh(mesh):
        state, record = advance(init_state(c), placed(batch_of(c, 0)))
        assert not record["skipped"] and float(record["grad_norm"]) > 0
        before = jax.tree.map(np.asarray, state)
        lies = jax.tree.map(lambda x: x.sharding, state)
        state, record = advance(state, placed(spoilt(c, 1)))
        assert record["skipped"] == 1 and not np.isfinite(record["loss"])
        assert jax.tree.map(lambda x: x.sharding, state) == lies
        after = jax.tree.map(np.asarray, state)
        assert after.pop("step") == before.pop("step") + 1 == 2
        assert schedules(before) and schedules(after) == [x + 1 for x in schedules(before)]
        leaves = without_schedules(before), without_schedules(after)
        for (path, x), (_, y) in zip(*leaves, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
        state, record = advance(state, placed(batch_of(c, 2)))
        assert not record["skipped"]
        moved = [
            (np.asarray(x) != y).any() for x, y in zip(
                jax.tree.leaves(state["params"]), jax.tree.leaves(after["params"]), strict=True
            )
        ]  # fmt: skip
        assert all(moved), "the step after is one again"


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_a_run_counts_and_goes_on_as_one_device(tmp_path, zero):
    """The same steps are skipped, and the losses of the others are those of one device."""
    spread = {"mesh": MeshConfig(data=2, seq=2), "zero": zero}
    parts = train(run(tmp_path / "parts", data=Spoilt(3, 6), **spread))
    alone = train(run(tmp_path / "alone", data=Spoilt(3, 6)))
    ours, theirs = (read_metrics(result.metrics_path) for result in (parts, alone))
    assert [r["skipped"] for r in ours] == [0, 0, 1, 1, 1, 2, 2, 2]
    finite = [[r["loss"] for r in some if np.isfinite(r["loss"])] for some in (ours, theirs)]
    assert len(finite[0]) == 6
    np.testing.assert_allclose(*finite, rtol=1e-5)
    again = dataclasses.replace(run(tmp_path / "parts", data=Spoilt(3, 6), **spread), keep=3)
    assert train(again).resumed_from == 8
