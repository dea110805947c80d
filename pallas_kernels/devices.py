# SPDX-License-Identifier: Apache-2.0
"""One table of chips: peak rates, memories and links, each number with its source.

All figures are vendor peaks, per chip unless the name says otherwise. They are ceilings to
divide by, not speeds that anybody measured here.

Sources:
  TPU: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}. "ICI" is given there as GB/s per chip
    in both directions; a link's one-way rate is that / 2 / ports.
  VMEM: jax.experimental.pallas.tpu.get_tpu_info, per TensorCore (jax 0.12.0).
  RTX: NVIDIA RTX Blackwell GPU architecture and RTX Blackwell PRO whitepapers, and the RTX PRO
    6000 data sheet. Dense rates: bf16 products summed in float32.
  H200: NVIDIA H200 Tensor Core GPU data sheet (its tensor rates are with sparsity: halved here).
  CUDA: CUDA C++ Programming Guide, compute capabilities 9.0 and 12.0.
"""

import dataclasses

GIB = 1 << 30
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nvidia:
    """An NVIDIA GPU for a compiler: the numbers beside those that every chip has."""

    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    clock_ghz: float  # boost
    l2_bytes: int
    shared_bytes_per_core: int
    threads_per_core: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip as its vendor describes it.

    `on_chip_bytes` is what one kernel block may hold: VMEM of a TensorCore, or shared memory of a
    thread block (opt-in). `links` are cables or ports; `link_bytes_per_second` is one of them in
    one direction. `device_kinds` are the ways `jax.Device.device_kind` begins.
    """

    name: str
    platform: str  # "tpu" or "gpu"
    device_kinds: tuple[str, ...]
    bf16_flops: float
    hbm_bytes: int
    hbm_bytes_per_second: float
    on_chip_bytes: int
    links: int
    link_bytes_per_second: float
    interconnect: str
    torus_axes: int = 0  # axes of a slice's shape; 0: no torus
    pod_chips: int = 0  # largest slice with these links
    devices_per_chip: int = 1
    nvidia: Nvidia | None = None

    @property
    def hbm_bytes_per_device(self) -> int:
        return self.hbm_bytes // self.devices_per_chip

    @property
    def bf16_flops_per_device(self) -> float:
        return self.bf16_flops / self.devices_per_chip


V5E = Chip(
    name="v5e",
    platform="tpu",
    device_kinds=("TPU v5 lite", "TPU v5e"),
    bf16_flops=197e12,  # docs v5e
    hbm_bytes=16 * GIB,  # docs v5e
    hbm_bytes_per_second=819e9,  # docs v5e
    on_chip_bytes=128 * MIB,  # get_tpu_info
    links=4,  # docs v5e, ICI ports
    link_bytes_per_second=50e9,  # docs v5e: 400 GB/s / 2 / 4
    interconnect="ICI 2-D torus",
    torus_axes=2,
    pod_chips=256,  # docs v5e
)
V5P = Chip(
    name="v5p",
    platform="tpu",
    device_kinds=("TPU v5p", "TPU v5"),  # two TensorCores, one JAX device
    bf16_flops=459e12,  # docs v5p
    hbm_bytes=95 * GIB,  # docs v5p
    hbm_bytes_per_second=2765e9,  # docs v5p
    on_chip_bytes=64 * MIB,  # get_tpu_info
    links=6,  # 3-D torus
    link_bytes_per_second=100e9,  # docs v5p: 1200 GB/s / 2 / 6
    interconnect="ICI 3-D torus",
    torus_axes=3,
    pod_chips=8960,  # docs v5p
)
V6E = Chip(
    name="v6e",
    platform="tpu",
    device_kinds=("TPU v6 lite", "TPU v6e"),
    bf16_flops=918e12,  # docs v6e
    hbm_bytes=32 * GIB,  # docs v6e
    hbm_bytes_per_second=1638e9,  # docs v6e
    on_chip_bytes=128 * MIB,  # get_tpu_info
    links=4,  # docs v6e, ICI ports
    link_bytes_per_second=100e9,  # docs v6e: 800 GB/s / 2 / 4
    interconnect="ICI 2-D torus",
    torus_axes=2,
    pod_chips=256,  # docs v6e
)
TPU7X = Chip(
    name="tpu7x",
    platform="tpu",
    device_kinds=("TPU7x", "TPU v7x"),
    bf16_flops=2307e12,  # docs tpu7x
    hbm_bytes=192 * GIB,  # docs tpu7x
    hbm_bytes_per_second=7380e9,  # docs tpu7x
    on_chip_bytes=64 * MIB,  # get_tpu_info
    links=6,  # 3-D torus
    link_bytes_per_second=100e9,  # docs tpu7x: 1200 GB/s / 2 / 6
    interconnect="ICI 3-D torus",
    torus_axes=3,
    pod_chips=9216,  # docs tpu7x
    devices_per_chip=2,  # docs tpu7x: each of the two chiplets is a device
)
RTX_PRO_6000 = Chip(
    name="rtx-pro-6000",
    platform="gpu",
    device_kinds=("NVIDIA RTX PRO 6000",),
    bf16_flops=503.8e12,  # RTX Blackwell PRO whitepaper, Workstation Edition (600 W)
    hbm_bytes=96 * GIB,  # data sheet
    hbm_bytes_per_second=1792e9,  # data sheet
    on_chip_bytes=101_376,  # CUDA 12.0: 99 KiB a block
    links=1,
    link_bytes_per_second=63e9,  # PCIe 5.0 x16: 32 GT/s x 16 x 128/130 / 8
    interconnect="PCIe 5.0 x16",
    nvidia=Nvidia(
        capability=(12, 0),
        cores=188,  # whitepaper
        clock_ghz=2.617,  # whitepaper
        l2_bytes=128 * MIB,  # whitepaper
        shared_bytes_per_core=102_400,  # CUDA 12.0
        threads_per_core=1536,  # CUDA 12.0
    ),
)
RTX_5090 = Chip(
    name="rtx-5090",
    platform="gpu",
    device_kinds=("NVIDIA GeForce RTX 5090",),
    bf16_flops=209.5e12,  # RTX Blackwell whitepaper: half rate when summed in float32
    hbm_bytes=32 * GIB,  # whitepaper
    hbm_bytes_per_second=1792e9,  # whitepaper
    on_chip_bytes=101_376,  # CUDA 12.0
    links=1,
    link_bytes_per_second=63e9,  # PCIe 5.0 x16; no peer-to-peer on GeForce: through host memory
    interconnect="PCIe 5.0 x16",
    nvidia=Nvidia(
        capability=(12, 0),
        cores=170,  # whitepaper
        clock_ghz=2.407,  # whitepaper
        l2_bytes=96 * MIB,  # whitepaper
        shared_bytes_per_core=102_400,  # CUDA 12.0
        threads_per_core=1536,  # CUDA 12.0
    ),
)
H200 = Chip(
    name="h200",
    platform="gpu",
    device_kinds=("NVIDIA H200",),
    bf16_flops=989.5e12,  # data sheet: 1979 TFLOP/s with sparsity
    hbm_bytes=141 * GIB,  # data sheet
    hbm_bytes_per_second=4800e9,  # data sheet
    on_chip_bytes=232_448,  # CUDA 9.0: 227 KiB a block
    links=18,  # NVLink 4
    link_bytes_per_second=25e9,  # data sheet: 900 GB/s / 2 / 18
    interconnect="NVLink 4",
    nvidia=Nvidia(
        capability=(9, 0),
        cores=132,  # Hopper tuning guide (H100 SXM, same die)
        clock_ghz=1.98,  # H100 SXM boost
        l2_bytes=50 * MIB,  # Hopper tuning guide
        shared_bytes_per_core=233_472,  # CUDA 9.0: 228 KiB
        threads_per_core=2048,  # CUDA 9.0
    ),
)

CHIPS = {chip.name: chip for chip in (V5E, V5P, V6E, TPU7X, RTX_PRO_6000, RTX_5090, H200)}


def find(device_kind: str) -> Chip | None:
    """Find the chip of a `jax.Device.device_kind`; None for one that is not in the table.

    >>> find("TPU v6 lite").name
    'v6e'
    """
    matches = [
        (len(kind), chip)
        for chip in CHIPS.values()
        for kind in chip.device_kinds
        if device_kind.startswith(kind)
    ]
    return (
        max(matches, key=lambda pair: pair[0])[1] if matches else None
    )  # "TPU v5 lite" is not "TPU v5"
