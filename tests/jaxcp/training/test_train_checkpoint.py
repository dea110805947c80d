# SPDX-License-Identifier: Apache-2.0
"""A checkpoint exists completely or not at all; a damaged one gives way to the one before."""

import logging
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxcp
from jaxcp.training import checkpoint


def state(seed=0, mesh=None):
    rng = np.random.default_rng(seed)
    tree = {
        "params": {"layers.0.q": rng.normal(size=(64, 64)).astype(np.float32)},
        "opt_state": (np.int32(seed), {"mu": rng.normal(size=(8,)).astype(np.float32)}),
        "half": rng.normal(size=(4,)).astype(jnp.bfloat16),
    }
    sharding = NamedSharding(mesh or jaxcp.make_mesh(seq=8), PartitionSpec())
    return jax.device_put(tree, sharding)


def biggest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_round_trip_keeps_the_newest(tmp_path):
    assert checkpoint.restore(tmp_path / "none", state()) is None
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert checkpoint.steps(tmp_path) == [2, 10]
    step, back = checkpoint.restore(tmp_path, state())
    assert step == 10
    chex.assert_trees_all_equal(back, state(10))


def test_restores_onto_another_mesh(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    mesh = jaxcp.make_mesh(data=2, seq=4)
    like = state(0, mesh)
    spread = NamedSharding(mesh, PartitionSpec("data", "seq"))
    like["params"] = jax.device_put(like["params"], spread)
    _, back = checkpoint.restore(tmp_path, like)
    chex.assert_trees_all_equal(back, state(1))
    assert back["params"]["layers.0.q"].sharding == spread


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_gives_way_and_is_set_aside(tmp_path, damage, caplog):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    file = biggest_file(tmp_path / "2")
    raw = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(raw[: len(raw) // 2])
    with caplog.at_level(logging.WARNING, logger="jaxcp"):
        step, back = checkpoint.restore(tmp_path, state())
    assert step == 1 and "cannot be read" in caplog.text
    chex.assert_trees_all_equal(back, state(1))
    assert (tmp_path / "2.unreadable").is_dir()
    checkpoint.save(tmp_path, 2, state(2), keep=3)  # its place is free again
    assert checkpoint.restore(tmp_path, state()).step == 2


def test_what_a_killed_save_leaves_does_not_count(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=3)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp-0")
    biggest_file(tmp_path / "2.orbax-checkpoint-tmp-0").unlink()
    assert checkpoint.restore(tmp_path, state()).step == 1
    checkpoint.save(tmp_path, 2, state(2), keep=3)
    assert checkpoint.restore(tmp_path, state()).step == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_what_dies_before_the_list_of_files_does_not_count(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    (tmp_path / "2" / "files.json").unlink()
    assert checkpoint.restore(tmp_path, state()).step == 1
    checkpoint.save(tmp_path, 2, state(2), keep=3)
    assert checkpoint.restore(tmp_path, state()).step == 2


def test_nothing_readable_is_an_error_and_not_a_fresh_start(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=3)
    shutil.rmtree(tmp_path / "1" / "ocdbt.process_0")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        checkpoint.restore(tmp_path, state())
    assert checkpoint.steps(tmp_path) == [1]
