# SPDX-License-Identifier: Apache-2.0
"""A checkpoint exists completely or not at all; a damaged one gives way to the one before."""

import contextlib
import json
import logging
import resource
import shutil
import subprocess

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxcp
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import StartConfig, TextSource, TrainConfig, checkpoint


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


@pytest.mark.parametrize("place", [0.125, 0.5, 0.875])
@pytest.mark.parametrize("which", [-1, -2])
def test_one_bit_that_changed_is_noticed(tmp_path, which, place, caplog):
    """Orbax restores each of these six without a word, wrong."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    data = [path for path in (tmp_path / "2").glob("ocdbt.process_0/d/*")]
    file = sorted(data, key=lambda path: path.stat().st_size)[which]
    raw = bytearray(file.read_bytes())
    raw[int(place * len(raw))] ^= 16
    file.write_bytes(raw)
    with caplog.at_level(logging.WARNING, logger="jaxcp"):
        step, back = checkpoint.restore(tmp_path, state())
    assert step == 1 and f"{file.name} has other contents than were written" in caplog.text
    chex.assert_trees_all_equal(back, state(1))


def test_a_list_with_sizes_alone_is_read_too(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=3)
    file = tmp_path / "1" / "files.json"
    old = {name: entry["bytes"] for name, entry in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(old))
    assert checkpoint.restore(tmp_path, state()).step == 1
    biggest_file(tmp_path / "1").write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 of"):
        checkpoint.restore(tmp_path, state())


def test_what_is_kept(tmp_path):
    with checkpoint.Saver(tmp_path, keep=2, keep_every=4) as saver:
        for step in range(1, 8):
            saver.save(step, state(step))
    assert checkpoint.steps(tmp_path) == [4, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6", "7"]


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    old = state(1)
    expected = jax.tree.map(np.array, old)
    with checkpoint.Saver(tmp_path, keep=2) as saver:
        saver.save(1, old)
        jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(old)
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, state()).state, expected)


def test_a_disk_that_fails_once_is_asked_again(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    errors, check = [OSError(5, "Input/output error")] * 2, checkpoint.check_list

    def flaky(folder, **part):
        if errors:
            raise errors.pop()
        check(folder, **part)

    monkeypatch.setattr(checkpoint, "check_list", flaky)
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0))
    with caplog.at_level(logging.WARNING, logger="jaxcp"):
        assert checkpoint.restore(tmp_path, state()).step == 2
    assert caplog.text.count("Input/output error; trying again") == 2
    assert not list(tmp_path.glob("*.unreadable"))


@contextlib.contextmanager
def small_disk(folder):
    """Let files in a folder grow to 64 KB in all, or each, where no disk can be made."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode:
        try:
            yield "No space left on device|it has .* bytes"
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
    try:
        yield "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def large():
    x = np.random.default_rng(0).integers(0, 1 << 30, size=1 << 16)
    return jax.device_put({"x": x.astype(np.int32)}, jax.devices()[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("known", [True, False], ids=["seen before", "seen while writing"])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, known, monkeypatch, capfd):
    if not known:  # as on a file system with quotas
        usage = shutil.disk_usage(tmp_path)._replace(free=1 << 40)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with small_disk(tmp_path / "disk") as reason:
        folder = tmp_path / "disk" / "checkpoints"
        small = jax.device_put({"x": np.zeros(4, np.int32)}, jax.devices()[0])
        checkpoint.save(folder, 1, small, keep=2)
        before = sorted(folder.rglob("*"))
        with pytest.raises(OSError, match=reason) as error:
            checkpoint.save(folder, 2, large(), keep=2)
        assert sorted(folder.rglob("*")) == before
    said = str(error.value)
    assert said.startswith(f"checkpoint {folder}/2 cannot be saved: ") and "\n" not in said
    assert capfd.readouterr().err == ""


def test_an_error_of_a_save_is_told_while_the_run_goes_on(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_list", full)
    saver = checkpoint.Saver(tmp_path, keep=2)
    saver.save(1, state(1))
    with pytest.raises(OSError, match="No space left on device; the disk has"):
        while True:
            saver.check()
    assert not list(tmp_path.iterdir())
    saver.check()  # told once


@pytest.mark.parametrize("folder", ["gs://bucket/run", "s3://bucket/run"])
def test_an_object_store_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = GPTConfig(vocab_size=256, max_positions=8, num_layers=1, num_heads=1, embed_dim=8)
    with pytest.raises(ValueError, match=f"out_dir must be a folder .*out_dir='{folder[:2]}"):
        TrainConfig(
            model=model, seq_len=8, batch_size=1, steps=1, data=TextSource(), out_dir=folder
        )
    with pytest.raises(ValueError, match="run must be a folder of a file system"):
        StartConfig(run=folder, step=3)
    assert not list(tmp_path.iterdir())


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
