# SPDX-License-Identifier: Apache-2.0
"""Eight emulated CPU devices for every test, and strict numerics."""

import os
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu and the CUDA plugin are installed for compiling only
# A test's time is the compilation of programs that run once, so the CPU's LLVM optimises none of
# them. HLO, collectives and memory stay what they are for every target; machine code does not, and
# whoever reads that asks for the optimised one (`gpu_code.dump_flags`).
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # a third of the compilation; jax 0.12 has no other emitters
        "--xla_cpu_use_fusion_emitters=false" * (metadata.version("jaxlib") < "0.12"),
        # Eight devices share a few cores with another worker: XLA ends the process where a
        # collective has waited 40 s for a device that only had no turn yet.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import gc
import pathlib
import sys

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")
# Programs that nobody debugs have no call stacks with their operations: a tenth of the compilation.
jax.config.update("jax_traceback_in_locations_limit", 0)
# The same examples every time and no deadline: a loaded machine must not fail a test.
hypothesis.settings.register_profile("jaxcp", derandomize=True, deadline=None)
hypothesis.settings.load_profile("jaxcp")


pytest_plugins = ["costs", "share"]
LINUX = sys.platform == "linux"
SHARE = os.sysconf("SC_PHYS_PAGES") // 5 if LINUX else 0
"""Pages of memory for one of two workers, whose tests also start processes."""
MAPPINGS = 30_000
"""Half of the pieces of memory that Linux lets a process map. A compiled program takes seven and
more, and XLA ends the process where it gets no other one."""
# Tracing makes many objects and few cycles: collecting them was 5 % of a run.
gc.set_threshold(50_000, 20, 50)


def pytest_sessionstart(session):
    assert jax.device_count() == 8, "the suite needs 8 emulated CPU devices"


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Compiled programs of modules that are done go where a worker has grown to its share."""
    yield
    if LINUX and (pages() > SHARE or mappings() > MAPPINGS):
        jax.clear_caches()


def pages() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])


def mappings() -> int:
    return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")


@pytest.fixture
def mesh_of():
    """`mesh_of(seq=4, data=2)`: enter a mesh over as many of the 8 devices as it needs."""
    import math

    import jaxcp

    stack = []

    def enter(**axes):
        context = jax.set_mesh(
            jaxcp.make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
        )
        context.__enter__()
        stack.append(context)

    yield enter
    while stack:
        stack.pop().__exit__(None, None, None)
