# SPDX-License-Identifier: Apache-2.0
"""The parts of each operation that have block sizes, with the values to try and their cost.

A part is a name in the first column of an operation's `tuning.py`. `values` lists the values to try
for a field; other fields stay as they ship.
"""

import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from jaxcp.compile import gpu_code, tpu_code
from jaxcp.tune import gpu_cost, programs, tpu_cost


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of chip to tune for.

    `chips`: names in `pallas_kernels.devices`, of which the first is compiled for. `kind`: the
    start of the device kind in a row. sm_120 has the least shared memory of all that the Triton
    kernels know, and its rows are those of any NVIDIA GPU.
    """

    platform: str
    chips: tuple[str, ...]
    kind: str


TARGETS = {
    "sm_120": Target("triton", ("rtx-pro-6000", "rtx-5090"), ""),
    "h200": Target("triton", ("h200",), "NVIDIA H200"),
    "v5e": Target("mosaic", ("v5e",), "TPU v5 lite"),
    "v5p": Target("mosaic", ("v5p",), "TPU v5p"),
    "v6e": Target("mosaic", ("v6e",), "TPU v6"),
    "tpu7x": Target("mosaic", ("tpu7x",), "TPU7x"),
}
IMPLEMENTATION = {"triton": "triton", "mosaic": "mosaic_tpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of an operation.

    `cost(part, chip, kernel, blocks, shape, itemsize)` returns the cost and what decides a draw.
    `kernel`: the start of its name in machine code. `size`: the field of the shape that the third
    column of the table bounds; a new row bounds it by the shape's value if `exact`, else by the
    bound of the row that it goes in front of.
    """

    op: str
    name: str
    kernel: str
    program: Callable
    shape: Mapping[str, int]
    size: str
    exact: bool
    values: Mapping[str, tuple[int, ...]]
    cost: Callable[..., tuple[float, float]]
    unit: str

    @property
    def tuning(self) -> ModuleType:
        return importlib.import_module(f"pallas_kernels.{self.op}.tuning")

    @property
    def implementation(self) -> str:
        return IMPLEMENTATION[self.name.split("_")[0]]

    def sized(self, given: Mapping[str, int]) -> dict[str, int]:
        """The default shape with the sizes in `given`.

        Raises:
          ValueError: a name that the part does not have, or a size below 1.
        """
        if unknown := given.keys() - self.shape.keys():
            raise ValueError(
                f"{self.op} has the sizes {', '.join(self.shape)}; got {', '.join(sorted(unknown))}"
            )
        if small := [f"{k}={v}" for k, v in given.items() if v < 1]:
            raise ValueError(f"sizes are 1 or more; got {', '.join(small)}")
        return {**self.shape, **given}

    def shipped(self, shape: Mapping[str, int], dtype) -> Any:
        """The row that the device in scope has now."""
        return self.tuning.blocks(self.name, shape[self.size], dtype, interpret=False)

    def candidates(self, shipped: Any, shape: Mapping[str, int]) -> Iterator[Any]:
        """Yield `shipped`, then all combinations of `values` that fit the shape, the nearest first.

        A search that a time limit cuts short has then tried the likely ones, not the corners.
        """
        products = itertools.product(*self.values.values())
        fields = (dict(zip(self.values, chosen, strict=True)) for chosen in products)
        every = (dataclasses.replace(shipped, **chosen) for chosen in fields)
        yield shipped
        for blocks in sorted(every, key=lambda blocks: self.doublings(shipped, blocks)):
            if blocks != shipped and fits(self, blocks, shape):
                yield blocks

    def doublings(self, one: Any, other: Any) -> float:
        """Count how often a field must be doubled or halved to come from one to the other."""
        pairs = [(getattr(one, name) + 1, getattr(other, name) + 1) for name in self.values]
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    def problem(self, shape: Mapping[str, int], dtype) -> tuple[Callable, tuple]:
        return self.program(self.implementation, dtype, **shape)


def fits(part: Part, blocks: Any, shape: Mapping[str, int]) -> bool:
    """Tell whether the kernel takes these blocks as they are."""
    triton = part.implementation == "triton"
    if part.op == "flash_attention":
        inside = triton or (blocks.sub <= blocks.kv and blocks.strip <= blocks.q)
        return inside and max(blocks.q, blocks.kv) <= shape["tokens"]
    if part.op == "decode_attention":
        rows = shape["slots"] * (1 if triton else shape["kv_heads"])
        return blocks.rows <= rows and (triton or blocks.sub <= blocks.rows)
    if triton:
        return True
    whole = shape["embed"] % blocks.k == 0 and shape["width"] % blocks.n == 0
    return whole and blocks.n % blocks.columns == 0 and blocks.m % blocks.rows == 0


def part_of(op: str, target: str, name: str | None = None) -> Part:
    """The part called `name`, or the operation's first for the target.

    Raises:
      ValueError: no such operation, target or part; the message names those there are.
    """
    if op not in {part.op for part in PARTS}:
        raise ValueError(
            f"op must be one of {', '.join(dict.fromkeys(part.op for part in PARTS))}; got {op!r}"
        )
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}; got {target!r}")
    platform = TARGETS[target].platform
    candidates = {
        part.name: part for part in PARTS if part.op == op and part.name.split("_")[0] == platform
    }
    if name is not None and name not in candidates:
        raise ValueError(f"{op} on {target} has the parts {', '.join(candidates)}; got {name!r}")
    return candidates[name or next(iter(candidates))]


def causal_tiles(tokens: int, q: int, kv: int) -> tuple[int, int]:
    """Count the tiles of a causal pass that are seen whole, and those seen in part."""
    whole = some = 0
    for first in range(0, tokens, q):
        last = min(first + q, tokens) - 1
        whole += (first + 1) // kv
        some += -(-(last + 1) // kv)
    return whole, some - whole


def attention_flops(part: str, head_dim: int) -> int:
    """FLOPs of one query and key: 2 products forward, 5 backward, of which dq needs 3, dkv 4."""
    products = {"forward": 2, "backward": 5, "dq": 3, "dkv": 4}[part.split("_")[1]]
    return 2 * products * head_dim


def attention_cost(part, chip, kernel, blocks, shape, itemsize):
    """Cost a causal pass of one head over the shape's tokens: whole tiles, and masked ones."""
    whole, partly = causal_tiles(shape["tokens"], blocks.q, blocks.kv)
    flops = attention_flops(part.name, shape["head_dim"])
    if isinstance(kernel, tpu_code.Kernel):
        tile = tpu_cost.attention_tile(chip, kernel, (blocks.q, blocks.kv), flops)
        return whole * tile[0] + partly * tile[1] + (whole + partly) * kernel.around, 0.0
    walked = blocks.q if part.name == "triton_dkv" else blocks.kv
    nbytes = 2 * walked * shape["head_dim"] * itemsize
    tile = gpu_cost.tile_slots(kernel, blocks.warps, flops * blocks.q * blocks.kv, nbytes)
    return whole * tile[0] + partly * tile[1], kernel.registers * blocks.warps


def decode_cost(part, chip, kernel, blocks, shape, itemsize):
    """Cost a pass over all slots of one sequence: the slower of bundles and HBM, then bundles."""
    if isinstance(kernel, tpu_code.Kernel):
        steps = shape["slots"] * shape["kv_heads"] / tpu_cost.step_rows(kernel)
        flops = 4 * shape["heads"] // shape["kv_heads"] * shape["head_dim"]
        step = tpu_cost.decode_step(chip, kernel, blocks, flops)
        hbm = tpu_cost.hbm_cycles(chip, tpu_cost.step_bytes(kernel))
        return steps * max(step, hbm), steps * step
    rows = max(16, 1 << (shape["heads"] // shape["kv_heads"] - 1).bit_length())
    warps = blocks.warps if rows <= 32 else 2 * blocks.warps
    flops = 4 * rows * blocks.rows * shape["head_dim"]
    nbytes = 2 * blocks.rows * shape["head_dim"] * itemsize
    slots = gpu_cost.tile_slots(kernel, warps, flops, nbytes)[0]
    tiles = shape["slots"] * shape["kv_heads"] / blocks.rows
    return slots * tiles, kernel.registers * warps


def expert_cost(part, chip, kernel, blocks, shape, itemsize, *, products=1):
    """Cost one expert: the slower of its work and of fetching its matrices, then its work.

    On a TPU its rows begin anywhere in a block, as they do in a model.
    """
    sizes = shape["tokens"], shape["embed"], shape["width"]
    if isinstance(kernel, tpu_code.Kernel):
        outer = part.name.endswith("_outer")
        if outer:
            work = tpu_cost.expert_gradient(chip, kernel, blocks, *sizes)
        else:
            work = tpu_cost.expert(chip, kernel, blocks, *sizes, products, aligned=False)
        nbytes = products * shape["embed"] * shape["width"] * itemsize
        return max(work, tpu_cost.hbm_cycles(chip, nbytes)), work
    flops = 2 * products * blocks.m * blocks.n * blocks.k
    nbytes = (blocks.m + products * blocks.n) * blocks.k * itemsize
    slots = gpu_cost.tile_slots(kernel, blocks.warps, flops, nbytes)[0]
    sides = (("tokens", "m"), ("width", "n"), ("embed", "k"))
    tiles = math.prod(-(-shape[size] // getattr(blocks, side)) for size, side in sides)
    return slots * tiles, kernel.registers * blocks.warps


def _flash(name, kernel, values, unit, **results):
    program = programs.flash_forward
    if results:
        program = functools.partial(programs.flash_backward, **results)
    return Part(
        op="flash_attention", name=name, kernel=f"flash_attention_{kernel}", program=program,
        shape=programs.FLASH, size="head_dim", exact=True, values=values, cost=attention_cost,
        unit=f"{unit} of a causal head",
    )  # fmt: skip


def _grouped(name, values, unit):
    kind = name.split("_")[1]
    cost = functools.partial(expert_cost, products=2) if kind == "swiglu" else expert_cost
    return Part(
        op="grouped_matmul", name=name, kernel=f"grouped_matmul_{kind}",
        program=getattr(programs, kind), shape=programs.EXPERTS, size="tokens", exact=False,
        values=values, cost=cost, unit=f"{unit} an expert",
    )  # fmt: skip


def _decode(name, values, unit):
    return Part(
        op="decode_attention", name=name, kernel="decode_attention", program=programs.decode,
        shape=programs.DECODE, size="head_dim", exact=True, values=values, cost=decode_cost,
        unit=f"{unit} a sequence",
    )  # fmt: skip


TILES = dict(q=(32, 64, 128), kv=(16, 32, 64, 128), warps=(4, 8), stages=(2, 3))
GROUPED = dict(m=(16, 64, 128), n=(64, 128, 256), k=(32, 64, 128), warps=(4, 8), stages=(2, 3))
PIECES = dict(rows=(16, 128, 256, 512), columns=(256, 512, 768))
PARTS = (
    _flash("triton_forward", "forward", TILES, "issue slots"),
    _flash("triton_dq", "dq", TILES, "issue slots", wanted=("dq",)),
    _flash("triton_dkv", "dkv", TILES, "issue slots", wanted=("dk", "dv")),
    _flash(
        "mosaic_forward",
        "forward",
        dict(q=(512, 1024, 2048), kv=(1024, 2048), sub=(256, 512), strip=(128, 256, 512)),
        "cycles",
    ),
    _flash(
        "mosaic_backward",
        "backward",
        dict(q=(256, 512, 1024), kv=(512, 1024, 2048), sub=(256, 512)),
        "cycles",
        wanted=("dq", "dk", "dv"),
    ),
    _grouped("triton_matmul", GROUPED, "issue slots"),
    _grouped("triton_swiglu", GROUPED, "issue slots"),
    _grouped("triton_outer", GROUPED, "issue slots"),
    _grouped("mosaic_matmul", dict(m=(128, 512), n=(768, 1536), k=(2048, 4096)) | PIECES, "cycles"),
    _grouped("mosaic_swiglu", dict(m=(128, 512), n=(512, 768), k=(2048, 4096)) | PIECES, "cycles"),
    _grouped("mosaic_outer", dict(m=(256, 512), n=(768, 1536), k=(512, 1024)) | PIECES, "cycles"),
    _decode(
        "triton", dict(rows=(16, 32, 64, 128), warps=(2, 4, 8), stages=(2, 3, 4)), "issue slots"
    ),
    _decode("mosaic", dict(rows=(4096, 8192, 16384), sub=(2048, 4096, 8192)), "cycles"),
)


def kernel_of(part: Part, kernels: Mapping[str, tpu_code.Kernel | gpu_code.Kernel]):
    """The part's own kernel among those of a program.

    Raises:
      ValueError: it is not there, or not alone.
    """
    fitting = [kernel for name, kernel in kernels.items() if name.startswith(part.kernel)]
    if len(fitting) != 1:
        raise ValueError(f"expected one kernel {part.kernel}; got {', '.join(kernels)}")
    return fitting[0]
