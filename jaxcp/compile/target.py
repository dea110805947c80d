# SPDX-License-Identifier: Apache-2.0
"""Machines that are not there: `parse_target("v6e:2x4")` and a mesh over the devices it describes.

libtpu and XLA's CUDA plugin compile for a described machine on any x86-64 Linux host. A target's
mesh can be traced, lowered and compiled for; nothing can be put on it or run.
"""

import contextlib
import dataclasses
import glob
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from jaxcp.mesh import AXES, MeshConfig
from pallas_kernels.devices import CHIPS, RTX_PRO_6000, Chip, Nvidia

FORMS = {0: "GPUs, or hosts x GPUs: rtx-pro-6000:8, h200:2x8", 2: "v6e:2x4", 3: "v5p:4x4x4"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of chip and a number. `shape`: a TPU slice in chips, or `(GPUs,)`, `(hosts, GPUs)`.

    Raises:
      ValueError: a kind that `pallas_kernels.devices` does not list, or a shape it cannot have.
    """

    kind: str
    shape: tuple[int, ...]

    def __post_init__(self):
        if self.kind not in CHIPS:
            raise ValueError(f"no chip named {self.kind!r}; known: {', '.join(CHIPS)}")
        axes = self.chip.torus_axes
        if len(self.shape) not in ({axes} if axes else {1, 2}) or min(self.shape) < 1:
            raise ValueError(
                f"{self.kind} needs a shape like {FORMS[axes]!r}, sizes 1 or more; got {self.shape}"
            )
        if axes and math.prod(self.shape) > self.chip.pod_chips:
            raise ValueError(
                f"a {self.kind} slice has at most {self.chip.pod_chips} chips; "
                f"{self} has {math.prod(self.shape)}"
            )

    def __str__(self):
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def size(self) -> int:
        """JAX devices, which are twice the chips on tpu7x."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    def mesh(self, *, data: int = 1, seq: int = 1, model: int = 1, expert: int = 1) -> Mesh:
        """`jaxcp.make_mesh` over the described devices, ordered for the chip's links.

        Raises:
          ValueError: the axes do not multiply to `size`.
          ImportError: the compiler for this target is not installed.
        """
        config = MeshConfig(data=data, seq=seq, model=model, expert=expert)
        if config.size != self.size:
            raise ValueError(
                f"mesh data={data} x seq={seq} x model={model} x expert={expert} needs "
                f"{config.size} devices; {self} has {self.size}. Change an axis or the target"
            )
        shape = tuple(getattr(config, axis) for axis in AXES)
        # A slice may have to be split across its own axes, which jax.make_mesh does for v5e only.
        devices = mesh_utils.create_device_mesh(
            shape, topology(self).devices, allow_split_physical_axes=True
        )
        return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def parse_target(text: str) -> Target:
    """Parse `"v6e:2x4"`, `"v5p:4x4x4"`, `"tpu7x:2x2x1"`, `"rtx-pro-6000:8"` or `"h200:2x8"`.

    A TPU's shape counts chips along the axes of its torus; a GPU's counts GPUs, or hosts x GPUs.

    Raises:
      ValueError: not of the form `kind:AxB`, an unknown kind, or a shape the kind cannot have.

    >>> parse_target("tpu7x:2x2x1").size
    8
    """
    match = re.fullmatch(r"([a-z][a-z0-9-]*):(\d+(?:x\d+)*)", text.strip().lower())
    if not match:
        raise ValueError(
            f"a target is kind:shape, like v6e:2x4 or h200:8, with kind one of {', '.join(CHIPS)}; "
            f"got {text!r}"
        )
    return Target(match[1], tuple(int(size) for size in match[2].split("x")))


def topology(target: Target) -> topologies.TopologyDescription:
    """Describe the target's devices, for compiling only.

    Raises:
      ImportError: libtpu or the CUDA plugin is not installed.
      ValueError: the compiler does not know such a slice.
    """
    if target.chip.nvidia:
        _need("jax_plugins.xla_cuda13", target)
        importlib.import_module("jax_plugins.xla_cuda13")  # registers the platform "cuda"
        hosts, devices = (1, *target.shape)[-2:]
        return topologies.get_topology_desc(
            "cuda",
            platform="cuda",
            target_config=target_config(target.chip),
            topology=f"1x{hosts}x{devices}",
        )
    _need("libtpu", target)
    with _no_metadata_server():
        try:
            return topologies.get_topology_desc(str(target), platform="tpu")
        except jax.errors.JaxRuntimeError as error:
            if "INVALID_ARGUMENT" not in str(error):
                raise
            raise ValueError(f"libtpu knows no slice {target}: {error}") from error


def target_config(chip: Chip) -> str:
    """Describe a GPU to XLA: a `GpuTargetConfigProto` in text form."""
    gpu = chip.nvidia
    if gpu is None:
        raise ValueError(f"{chip.name} is no GPU; it has no GpuTargetConfigProto")
    limits = {
        "core_count": gpu.cores,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": chip.hbm_bytes,
        "memory_bandwidth": int(chip.hbm_bytes_per_second),
        "l2_cache_size": gpu.l2_bytes,
        "shared_memory_per_core": gpu.shared_bytes_per_core,
        "shared_memory_per_block_optin": chip.on_chip_bytes,
        "threads_per_core_limit": gpu.threads_per_core,
        **EVERY_NVIDIA_GPU,
    }
    fields = "\n".join(f"  {name}: {value}" for name, value in limits.items())
    major, minor = gpu.capability
    return (
        f'platform_name: "CUDA"\ndevice_description_str: "{_compile_kind(chip, gpu)}"\n'
        "dnn_version_info { major: 9 minor: 10 }\n"
        f"gpu_device_info {{\n{fields}\n"
        # sm_90a, sm_120a: XLA says so of a card that is there; without it some instructions are not
        f"  cuda_compute_capability {{ major: {major} minor: {minor} "
        "feature_extension: ACCELERATED_FEATURES }\n}\n"
    )


EVERY_NVIDIA_GPU = {  # CUDA C++ Programming Guide, capabilities 9.0 and 12.0 alike
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "shared_memory_per_block": 48 << 10,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
}


def _compile_kind(chip: Chip, gpu: Nvidia) -> str:
    # Since jax 0.11 Pallas-Triton knows the architecture of an absent GPU by a list of names that
    # has no GeForce 50xx; the PRO card has the same architecture and the same limits for a block.
    same = RTX_PRO_6000.nvidia
    assert same is not None
    return (RTX_PRO_6000 if gpu.capability == same.capability else chip).device_kinds[0]


def _need(module: str, target: Target) -> None:
    try:
        installed = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # no parent package
        installed = False
    if not installed:
        raise ImportError(
            f"compiling for {target} needs {module.split('.')[-1]}, which is not installed: "
            "pip install jaxcp[aot]  (Linux on x86-64)"
        )


@contextlib.contextmanager
def _no_metadata_server() -> Iterator[None]:
    """Keep libtpu, as it loads, from asking a cloud host that is not there who it is."""
    values = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any valid one: the topology's name decides
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock guards chips, and there are none
    }
    # On a TPU VM libtpu must learn the truth, or jax.devices() would be wrong afterwards.
    real = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    added = {} if real else {k: v for k, v in values.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
