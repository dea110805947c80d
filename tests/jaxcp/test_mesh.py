# SPDX-License-Identifier: Apache-2.0
"""Meshes that fit, and errors that say how to make one fit."""

import subprocess
import sys

import jax
import pytest
from jax.sharding import AxisType

import jaxcp
from jaxcp import MeshConfig


def test_axes_and_their_order():
    mesh = jaxcp.make_mesh(data=2, seq=4)
    assert dict(mesh.shape) == {"data": 2, "seq": 4, "model": 1, "expert": 1}
    assert mesh.axis_types == (AxisType.Explicit,) * 4


def test_some_of_the_devices():
    devices = jax.devices()[2:5]
    mesh = MeshConfig(seq=3).make(devices)
    assert mesh.devices.ravel().tolist() == devices


@pytest.mark.parametrize("axes, size", [({"seq": 9}, 9), ({"seq": 8, "data": 2}, 16)])
def test_a_mesh_that_does_not_fit(axes, size):
    with pytest.raises(ValueError, match=rf"needs {size} devices; got 8 \(cpu\).*emulate_devices"):
        jaxcp.make_mesh(**axes)


@pytest.mark.parametrize("axes, size", [({}, 1), ({"seq": 3}, 3), ({"seq": 2, "data": 2}, 4)])
@pytest.mark.parametrize("given", [False, True], ids=["all there are", "given"])
def test_a_smaller_mesh_takes_the_first_devices_and_says_who_is_idle(caplog, axes, size, given):
    every = jax.devices()
    mesh = jaxcp.make_mesh(**axes, devices=every if given else None)
    shape = tuple(axes.get(axis, 1) for axis in mesh.axis_names)
    as_jax = jax.make_mesh(shape, mesh.axis_names, devices=every if given else None)
    assert mesh.devices.ravel().tolist() == as_jax.devices.ravel().tolist() == every[:size]
    [record] = caplog.records
    assert record.levelname == "WARNING" and f"takes {size} of 8 devices" in record.message
    assert [str(device) in record.message for device in every] == [i >= size for i in range(8)]


def test_a_mesh_over_every_device_says_nothing(caplog):
    jaxcp.make_mesh(seq=8)
    MeshConfig(seq=3).make(jax.devices()[:3])
    assert not caplog.records


def test_no_devices_cannot_be_emulated():
    with pytest.raises(ValueError, match="1 device or more; got count=0"):
        jaxcp.emulate_devices(0)


def test_a_mesh_over_no_devices():
    with pytest.raises(ValueError, match="needs 2 devices; got 0"):
        jaxcp.make_mesh(seq=2, devices=[])


def test_axes_that_make_no_sense():
    with pytest.raises(ValueError, match="mesh axis seq must be at least 1; got 0"):
        MeshConfig(seq=0)


def test_emulating_after_jax_was_used():
    jaxcp.emulate_devices(8)  # what there is: fine
    with pytest.raises(RuntimeError, match=r"emulate_devices\(4\) came after .* with 8 cpu"):
        jaxcp.emulate_devices(4)
    assert jax.device_count() == 8


def test_emulating_first():
    code = "import jaxcp; jaxcp.emulate_devices(3); import jax; print(jax.devices())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.count("CpuDevice") == 3
