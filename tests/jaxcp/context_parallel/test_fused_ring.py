# SPDX-License-Identifier: Apache-2.0
"""`Ring(fused=True)`, interpreted: it is dense attention, and nothing in it races."""

import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from dense_attention import dense
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

import jaxcp
from jaxcp.layout import Contiguous, Zigzag
from pallas_kernels import PAD_POSITION
from pallas_kernels.flash_attention import tuning
from pallas_kernels.ring_attention import mosaic_tpu

TOKENS = P("data", "seq")


def row(queries, op="mosaic_backward"):
    """Blocks in one piece, which is faster: how pieces go together `test_mosaic_tpu` tests."""
    return op, "", 512, 4, tuning.Blocks(q=queries, kv=128, sub=128, strip=256)


@pytest.fixture(autouse=True)
def races(monkeypatch, capsys, caplog):
    """Look for races; call it for how many were reported: jax 0.10 prints them, 0.12 logs them."""
    more = {"on_race": "warn"} if hasattr(pltpu.InterpretParams, "on_race") else {}
    watching = pltpu.InterpretParams(detect_races=True, **more)
    monkeypatch.setattr(mosaic_tpu, "INTERPRETED", watching)
    rows = row(256, "mosaic_forward"), row(256)
    monkeypatch.setattr(tuning, "TABLE", (*rows, *tuning.TABLE))
    yield lambda: (capsys.readouterr().out + caplog.text).count("RACE DETECTED")
    pltpu.reset_tpu_interpret_mode_state()


def problem(tokens, *, batch=1, heads=1, kv_heads=1, width=16):
    rng = np.random.default_rng(0)

    def normal(heads):
        return rng.normal(size=(batch, tokens, heads, width)).astype(np.float32)

    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, tokens))
    arrays = {"q": normal(heads), "k": normal(kv_heads), "v": normal(kv_heads)}
    return {**arrays, "dout": normal(heads), "positions": positions}


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(strategy, options, x):
    def attend(q, k, v, sinks):
        return jaxcp.context_parallel_attention(
            q, k, v, x["positions"], strategy=strategy, segment_ids=x.get("segment_ids"),
            sinks=sinks, implementation="mosaic_tpu", **dict(options),
        )  # fmt: skip

    arrays = x["q"], x["k"], x["v"], x.get("sinks")
    if "dout" not in x:
        return (attend(*arrays),)
    out, pull = jax.vjp(attend, *arrays)
    return out, *pull(x["dout"])


def check(strategy, shards, x, *, axes="seq", **options):
    """Under the mesh in scope, against float64, in natural order."""
    sinks = x.get("sinks")
    there = strategy.layout.permute({name: x[name] for name in x if name != "sinks"}, shards)
    spec = TOKENS if axes == "seq" else P(None, axes)
    there = {name: jax.device_put(y, spec) for name, y in there.items()}
    if sinks is not None:
        there["sinks"] = jax.device_put(sinks, P())
    static = tuple({**options, "axis_name": axes}.items())
    *found, dsinks = with_gradients(strategy, static, there)
    found = [strategy.layout.inverse(y, shards, x["q"].shape[1]) for y in found]
    wanted = dense(
        x["q"], x["k"], x["v"], x["positions"], segment_ids=x.get("segment_ids"), sinks=sinks,
        dout=x["dout"], **options,
    )  # fmt: skip
    if sinks is not None:
        found.append(dsinks)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), found, wanted, strict=False):
        close = 2e-6 * max(1, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=close, err_msg=name)


@pytest.mark.slow
def test_every_mask_and_option_beside_another_mesh_axis(mesh_of, races):
    """An odd length, pads, documents, a window, soft cap, sinks, grouped heads; two rings."""
    mesh_of(data=2, seq=3)
    x = problem(353, batch=2, heads=2)
    x["segment_ids"] = np.sort(np.arange(706).reshape(2, 353) % 3, axis=1).astype(np.int32)
    x["sinks"] = np.array([-np.inf, -1.0], np.float32)
    x["positions"] = np.where(np.arange(353) < 5, PAD_POSITION, x["positions"]).astype(np.int32)
    check(jaxcp.Ring(fused=True), 3, x, window=140, soft_cap=2.0, scale=0.4)
    assert races() == 0


@pytest.mark.slow
def test_more_keys_a_chunk_and_more_queries_than_vmem_holds(mesh_of, races, monkeypatch):
    """And no causality, and two rows a device."""
    monkeypatch.setattr(mosaic_tpu, "MOST_CHUNKS", 1)
    monkeypatch.setattr(mosaic_tpu, "DQ_BYTES", 1)
    monkeypatch.setattr(tuning, "TABLE", (row(128), *tuning.TABLE))
    mesh_of(seq=2)
    check(jaxcp.Ring(fused=True), 2, problem(2 * 200, batch=2), causal=False)
    assert races() == 0


@pytest.mark.slow
def test_several_blocks_of_queries_beside_several_of_keys_in_a_chunk(mesh_of, races, monkeypatch):
    """Two query heads a KV head, each of two blocks, whose gradients grow from step to step."""
    monkeypatch.setattr(mosaic_tpu, "MOST_CHUNKS", 1)
    monkeypatch.setattr(tuning, "TABLE", (row(128), *tuning.TABLE))
    mesh_of(seq=2)
    check(jaxcp.Ring(fused=True), 2, problem(2 * 200, heads=2), causal=False)
    assert races() == 0


@pytest.mark.slow
def test_both_directions_over_two_mesh_axes(mesh_of, races):
    mesh_of(data=2, seq=2)
    fused = jaxcp.Ring(fused=True, bidirectional=True)
    check(fused, 4, problem(4 * 200), axes=("data", "seq"))
    assert races() == 0


@pytest.mark.slow
def test_eight_devices_of_which_half_has_nothing_to_do(mesh_of, races):
    """In a process with threads to spare: XLA has as many as devices, and when all of them wait in
    the interpreter none is left for the copy of an argument that one of them waits for."""
    if "NPROC" not in os.environ:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "eight", __file__]
        spared = {"NPROC": "32", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            command, env=os.environ | spared, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
        return
    mesh_of(seq=8)
    check(jaxcp.Ring(fused=True, layout=Contiguous()), 8, problem(8 * 128))
    assert races() == 0


def test_without_credits_it_races(mesh_of, races, monkeypatch):
    """What the other tests would not see if the detector did not look."""
    for name in ("grant", "take"):
        monkeypatch.setattr(mosaic_tpu.Stream, name, lambda *_: None)
    mesh_of(seq=4)
    x = problem(4 * 128)
    del x["dout"]
    layout = Zigzag()
    there = {name: jax.device_put(y, TOKENS) for name, y in layout.permute(x, 4).items()}
    jax.block_until_ready(with_gradients(jaxcp.Ring(fused=True), (("window", None),), there))
    assert races() > 0


def test_what_it_refuses(mesh_of):
    x = problem(8)
    arrays = x["q"], x["k"], x["v"], x["positions"]
    attend = jaxcp.context_parallel_attention
    mesh_of(seq=2)
    fused = jaxcp.Ring(fused=True)
    for implementation in (None, "xla", "triton"):  # this is a CPU
        with pytest.raises(NotImplementedError, match=r"use a ring of ppermute.*jaxcp.Ring\(\)"):
            attend(*arrays, strategy=fused, implementation=implementation)
    with pytest.raises(ValueError, match="implementation must be one of"):
        attend(*arrays, strategy=fused, implementation="cuda")
    wide = np.zeros((1, 8, 1, 640), np.float32)
    with pytest.raises(NotImplementedError, match="head dims up to 512; got float32 and head dims"):
        attend(wide, wide, wide, x["positions"], strategy=fused, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="no latents; use Ring"):
        jaxcp.latent_attention(
            x["q"], x["k"], (), x["positions"], strategy=fused, expand=lambda k: (k, k)
        )


def test_one_device_is_flash_attention(mesh_of):
    mesh_of(seq=1)
    x = problem(40)
    trace = jax.make_jaxpr(with_gradients.__wrapped__, static_argnums=(0, 1))
    program = str(trace(jaxcp.Ring(fused=True), (), x))
    for kernel in ("forward", "backward"):
        assert f"flash_attention_{kernel}" in program and f"ring_attention_{kernel}" not in program
