# SPDX-License-Identifier: Apache-2.0
"""The table of chips holds together, and needs nothing to be imported."""

import subprocess
import sys

import pytest

from pallas_kernels import devices


@pytest.mark.parametrize("chip", devices.CHIPS.values(), ids=lambda chip: chip.name)
def test_every_chip_is_complete(chip):
    assert devices.CHIPS[chip.name] is chip
    assert chip.platform in ("tpu", "gpu")
    assert (chip.nvidia is not None) == (chip.platform == "gpu")
    assert (chip.torus_axes in (2, 3)) == (chip.platform == "tpu")
    assert chip.links * chip.link_bytes_per_second < chip.hbm_bytes_per_second
    # bf16 FLOPs per byte of HBM: a slip of a thousand in either would leave this range
    assert 50 < chip.bf16_flops / chip.hbm_bytes_per_second < 1000
    for kind in chip.device_kinds:
        assert devices.find(kind) is chip


def test_shared_memory_of_a_block_is_less_than_the_cores():
    for chip in devices.CHIPS.values():
        if chip.nvidia:
            assert chip.on_chip_bytes == chip.nvidia.shared_bytes_per_core - 1024


def test_find_takes_the_longest_kind():
    assert devices.find("TPU v5 lite").name == "v5e"
    assert devices.find("TPU v5").name == "v5p"
    assert devices.find("NVIDIA RTX PRO 6000 Blackwell Server Edition").name == "rtx-pro-6000"
    assert devices.find("cpu") is None


def test_a_device_of_a_two_device_chip_has_half():
    assert devices.TPU7X.hbm_bytes_per_device * 2 == devices.TPU7X.hbm_bytes
    assert devices.TPU7X.bf16_flops_per_device * 2 == devices.TPU7X.bf16_flops
    assert devices.V5P.hbm_bytes_per_device == devices.V5P.hbm_bytes


def test_the_table_imports_the_standard_library_only():
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('devices', {devices.__file__!r}); "
        "module = importlib.util.module_from_spec(spec); sys.modules['devices'] = module; "
        "spec.loader.exec_module(module); "
        "assert not {'jax', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
