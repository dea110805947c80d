# SPDX-License-Identifier: Apache-2.0
"""Programs are compiled for machines that are not there, and what they send is counted exactly."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcp.mesh
from jaxcp.compile import Collective, collectives, compile_for, on_mesh, parse_target, topology
from jaxcp.compile.target import target_config
from pallas_kernels.devices import CHIPS

SHARD = (128, 128)
BYTES = 128 * 128 * 4


def mesh_of(where: str, **axes):
    if where == "cpu":
        return jaxcp.mesh.make_mesh(**axes, devices=jax.devices())
    return parse_target(where).mesh(**axes)


def ring(platform: str, rotations: int):
    """Rotate `x` around `seq` in a loop, with a Pallas kernel beside each rotation."""

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    def local(x):
        kernel = pl.pallas_call(
            double,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            compiler_params=plt.CompilerParams(num_warps=4) if platform == "gpu" else None,
            interpret=platform == "cpu",
        )
        pairs = [(i, (i + 1) % 8) for i in range(8)]

        def turn(_, carry):
            x, total = carry
            return jax.lax.ppermute(x, "seq", pairs), total + kernel(x)

        return jax.lax.fori_loop(0, rotations, turn, (x, x))[1]

    return lambda x: jax.shard_map(local, in_specs=P("seq"), out_specs=P("seq"), check_vma=False)(x)


def rows(mesh, *spec):
    sharding = NamedSharding(mesh, P(*(spec or ("seq",))))
    return jax.ShapeDtypeStruct((8 * SHARD[0], SHARD[1]), jnp.float32, sharding=sharding)


# jax 0.11 and later warn when Pallas-Triton is used; it works through 0.12.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

PLACES = ["cpu", "v6e:2x4", "rtx-pro-6000:8"]


@pytest.mark.parametrize("where", PLACES)
def test_a_ring_sends_its_shard_once_a_turn(where):
    mesh = mesh_of(where, seq=8)
    platform = mesh.devices.flat[0].platform
    report = compile_for(ring(platform, 7), (rows(mesh),), mesh)
    [permutes] = report.collectives
    assert (permutes.kind, permutes.count, permutes.bytes) == ("collective-permute", 7, 7 * BYTES)
    assert permutes.note == "in loops of 7 turns"
    assert report.kernels == (0 if where == "cpu" else 7)
    assert report.argument_bytes == BYTES
    assert report.output_bytes == BYTES
    assert report.total_bytes == report.argument_bytes + report.output_bytes + report.temp_bytes
    assert "collective-permute" in str(report) and "MiB" in str(report)
    if where != "cpu":
        assert report.hbm_bytes == parse_target(where).chip.hbm_bytes
        assert parse_target(where).kind in report.target


@pytest.mark.parametrize("where", PLACES)
def test_every_kind_is_counted_once(where):
    def local(x):
        gathered = jax.lax.all_gather(x, "seq")
        scattered = jax.lax.psum_scatter(x, "seq", tiled=True)
        summed = jax.lax.psum(x[0], "seq")
        exchanged = jax.lax.all_to_all(x, "seq", 0, 1, tiled=True)
        return gathered.max(0) + summed + jnp.sum(exchanged), scattered

    def fn(x):
        specs = (P("seq"), P("seq"))
        return jax.shard_map(local, in_specs=P("seq"), out_specs=specs, check_vma=False)(x)

    mesh = mesh_of(where, seq=8)
    report = compile_for(jax.jit(fn), (rows(mesh),), mesh)
    assert {c.kind: (c.count, c.bytes) for c in report.collectives} == {
        "all-gather": (1, 8 * BYTES),
        "reduce-scatter": (1, BYTES),
        "all-reduce": (1, BYTES // 128),
        "all-to-all": (1, BYTES),
    }
    assert report.kernels == 0


def test_loops_multiply_and_unknown_loops_are_named():
    mesh = mesh_of("cpu", seq=8)

    def shift(x):
        return jax.lax.ppermute(x, "seq", [(i, (i + 1) % 8) for i in range(8)])

    def local(x):
        def outer(_, x):
            return jax.lax.fori_loop(0, 5, lambda _, x: shift(x) * 2, x) + 1

        x = jax.lax.fori_loop(0, 3, outer, x)
        return jax.lax.while_loop(lambda x: x[0, 0] < 100, lambda x: shift(x) + 1, x)

    def fn(x):
        return jax.shard_map(local, in_specs=P("seq"), out_specs=P("seq"), check_vma=False)(x)

    [permutes] = compile_for(fn, (rows(mesh),), mesh).collectives
    assert permutes.count == 3 * 5 + 1
    assert permutes.note == "in loops of 15 turns; a loop of unknown length counted once"


HLO = """HloModule m

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %one = s32[]{:T(128)} constant(1)
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %start = (bf16[4,8], bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]) collective-permute-start(%x)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %next = s32[]{:T(128)} add(%i, %one)
  %done = bf16[4,8]{1,0} collective-permute-done(%start)
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%next, %done)
}

%condition (q: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[] constant(6)
  %q = (s32[], bf16[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

%scatter (a: bf16[4,8]) -> bf16[1,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  ROOT %s = bf16[1,8]{1,0} reduce-scatter(%a), dimensions={0}, to_apply=%add
}

ENTRY %main (y: bf16[4,8]) -> bf16[1,8] {
  %y = bf16[4,8]{1,0} parameter(0)
  %zero = s32[] constant(FIRST)
  %start.0 = s32[] copy(%zero)
  %in = (s32[], bf16[4,8]{1,0}) tuple(%start.0, %y)
  %loop = (s32[], bf16[4,8]{1,0}) while(%in), condition=%condition, body=%body
  %z = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
  %as = ((bf16[4,8]{1,0}), bf16[1,8]{1,0}, u32[]) async-start(%z), calls=%scatter
  ROOT %ad = bf16[1,8]{1,0} async-done(%as), calls=%scatter
}
"""


@pytest.mark.parametrize("first, turns", [(0, 6), (2, 4)])
def test_turns_are_found_without_xlas_note(first, turns):
    note = f"in loops of {turns} turns"
    assert collectives(HLO.replace("FIRST", str(first))) == [
        Collective(
            kind="collective-permute",
            count=turns,
            bytes=turns * 64,
            note=note,
        ),
        Collective(kind="reduce-scatter", count=1, bytes=64),
    ]


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("HloModule empty")


@pytest.mark.parametrize(
    "text, kind, shape, size",
    [
        ("v6e:2x4", "v6e", (2, 4), 8),
        ("v5p:4x4x4", "v5p", (4, 4, 4), 64),
        ("tpu7x:2x2x1", "tpu7x", (2, 2, 1), 8),
        ("RTX-PRO-6000:8", "rtx-pro-6000", (8,), 8),
        ("h200:2x8", "h200", (2, 8), 16),
    ],
)
def test_targets(text, kind, shape, size):
    target = parse_target(text)
    assert (target.kind, target.shape, target.size) == (kind, shape, size)
    assert str(target) == text.lower()
    assert hash(target) == hash(parse_target(text))


@pytest.mark.parametrize(
    "text, message",
    [
        ("v6e", "kind:shape.*v5e, v5p, v6e, tpu7x, rtx-pro-6000, rtx-5090, h200"),
        ("v6e:", "kind:shape"),
        ("v6e:2,4", "kind:shape"),
        ("b200:8", "no chip named 'b200'; known: v5e"),
        ("v6e:2x2x2", "v6e needs a shape like 'v6e:2x4'"),
        ("v5p:4x4", "v5p needs a shape like 'v5p:4x4x4'"),
        ("h200:1x2x8", "hosts x GPUs"),
        ("h200:0", "sizes 1 or more"),
        ("v6e:32x32", "at most 256 chips"),
    ],
)
def test_targets_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_target(text)


def test_a_slice_that_libtpu_does_not_know():
    with pytest.raises(ValueError, match="libtpu knows no slice v6e:3x5"):
        topology(parse_target("v6e:3x5"))


@pytest.mark.parametrize("text", ["v5e:4x4", "v5p:2x2x2", "tpu7x:2x2x1", "rtx-5090:4", "h200:2x4"])
def test_the_described_devices_are_the_tables(text):
    target = parse_target(text)
    before = dict(os.environ)
    found = topology(target).devices
    assert dict(os.environ) == before
    assert len(found) == target.size
    kinds = target.chip.device_kinds
    if text.startswith("rtx-5090"):  # compiled as its bigger sister: same architecture and limits
        kinds = CHIPS["rtx-pro-6000"].device_kinds
    assert found[0].device_kind.startswith(kinds)


def test_a_mesh_over_a_slice_that_must_be_split():
    mesh = parse_target("v5p:4x4x4").mesh(data=2, seq=32)
    assert dict(mesh.shape) == {"data": 2, "seq": 32, "model": 1, "expert": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    assert len({device.id for device in mesh.devices.flat}) == 64


def test_neighbours_in_the_ring_are_neighbours_in_the_slice():
    places = [device.coords for device in parse_target("v6e:4x4").mesh(seq=16).devices.flat]
    hops = np.abs(np.subtract(places, np.roll(places, -1, axis=0))).sum(axis=1)
    assert set(hops) == {1}


def test_axes_that_do_not_fill_the_target():
    with pytest.raises(ValueError, match="needs 4 devices; v6e:2x4 has 8"):
        parse_target("v6e:2x4").mesh(seq=4)


def test_a_tpu_has_no_gpu_description():
    with pytest.raises(ValueError, match="v6e is no GPU"):
        target_config(CHIPS["v6e"])


@pytest.mark.parametrize("text, module", [("v6e:2x4", "libtpu"), ("h200:8", "xla_cuda13")])
def test_a_compiler_that_is_not_installed(text, module, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if module in name else real(name)
    )
    with pytest.raises(ImportError, match=rf"needs {module}.*pip install jaxcp\[aot\]"):
        topology(parse_target(text))


def test_arguments_without_a_sharding_are_replicated():
    mesh = mesh_of("cpu", seq=8)
    tree = {"a": np.zeros((8, 4), np.float32), "b": rows(mesh, None, "seq"), "c": None, "d": 3}
    described = on_mesh(tree, mesh)
    assert described["a"].sharding == NamedSharding(mesh, P())
    assert described["b"].sharding.spec == P(None, "seq")
    assert described["d"] == 3


def test_what_is_donated_is_counted_once():
    mesh = mesh_of("v6e:2x4", seq=8)
    plain = compile_for(lambda x: x * 2, (rows(mesh),), mesh)
    donated = compile_for(jax.jit(lambda x: x * 2, donate_argnums=0), (rows(mesh),), mesh)
    assert plain.total_bytes - donated.total_bytes == BYTES


def test_a_program_that_cannot_be_read_says_so():
    mesh = mesh_of("v6e:2x4", seq=8)
    report = compile_for(lambda x: x * 2, (rows(mesh),), mesh)
    assert "none" in str(report)
    unread = dataclasses.replace(report, collectives=None, kernels=None)
    assert "not known" in str(unread) and "jax[tpu]" in str(unread) and "none" not in str(unread)


def test_compiling_starts_no_backend_and_needs_no_variables():
    code = (
        "import jax, jaxcp.compile as p; m = p.parse_target('v6e:2x2').mesh(seq=4); "
        "r = p.compile_for(lambda x: x @ x, (jax.ShapeDtypeStruct((256, 256), 'float32'),), m); "
        "assert r.argument_bytes == 4 * 256 * 256, r"
    )
    drop = ("TPU_", "LIBTPU", "XLA_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)} | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
