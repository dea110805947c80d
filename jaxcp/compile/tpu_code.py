# SPDX-License-Identifier: Apache-2.0
"""Read the program that libtpu emits for a kernel: regions of VLIW bundles and what fills them.

One bundle issues in one cycle of a TensorCore. libtpu writes, when `init_args` are in
LIBTPU_INIT_ARGS before it is loaded, the final bundles of every kernel and, bundle by bundle, how
many slots of each unit are filled. Regions are what `pl.when`, loops and pipelines become.
Format of libtpu 0.0.42 to 0.0.52; another is an error and not a wrong number.

A bundle count says nothing of DMA that is not hidden, of a grid step's fixed cost, nor of stalls.
"""

import dataclasses
import math
import pathlib
import re

BUNDLE = re.compile(r"\s*(?:0x([0-9a-f]+)|0)\s+(?:[A-Z]{2})?\s*:([ >]*)\{")
MATMUL = re.compile(r"= vmatmul\b")
MARK = re.compile(r"(Start|End) region (\d+)")
MATRIX = ("MATMUL", "MATPUSH", "MXU")  # 0.0.42 and 0.0.50 call both MXU


def init_args(folder) -> str:
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        # only the last pass: all of them are some hundred megabytes a kernel
        "--xla_jf_dump_llo_pass_label_regex=.*final_.*"
    )


@dataclasses.dataclass(eq=False)
class Region:
    """Bundles `first` to `last`, regions inside included; `loops` around it."""

    ident: int
    first: int
    last: int = -1
    loops: int = 0
    parent: "Region | None" = None
    inside: list["Region"] = dataclasses.field(default_factory=list)
    slots: dict[str, int] = dataclasses.field(default_factory=dict)
    matmuls: int = 0

    @property
    def bundles(self) -> int:
        return self.last - self.first + 1

    @property
    def matrix(self) -> int:
        return sum(self.slots.get(unit, 0) for unit in MATRIX)


@dataclasses.dataclass(frozen=True)
class Hot:
    """A piece of straight-line code that does a kernel's matrix work, from bundle `first` on.

    `floors`: the bundles that each unit alone would need. If the greatest is near `bundles`, that
    unit is the bottleneck; else dependences are. `matmuls`: instructions that multiply.
    """

    first: int
    bundles: int
    loops: int
    matmuls: int
    floors: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's `hot` pieces, those of fewest bundles first.

    `around`: bundles of loops outside of them. `windows`: dtype, shape and bytes that a grid step
    fetches, one for each blocked input.
    """

    hot: list[Hot]
    around: int
    windows: list[tuple[str, tuple[int, ...], int]]


def kernels(folder: pathlib.Path) -> dict[str, Kernel]:
    """Read the kernels with matrix work in `folder`, by name."""
    by_name = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        name = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
        tables = list(folder.glob(f"{path.name.split('-')[0]}-*per-bundle-utilization.txt"))
        if name and len(tables) == 1:
            program = path.read_text()
            regions, capacity = read(program, tables[0].read_text(), path.name)
            leaves = _leaves(regions)
            if leaves:
                by_name[re.sub(r"\.\d+$", "", name[1])] = Kernel(
                    hot=_hot(leaves, capacity),
                    around=_around(program, leaves),
                    windows=_windows(program),
                )
    return by_name


def _windows(program):
    """Read the compiler's notes on the input windows, in the first bundle: dtype, shape, bytes."""
    entry = next((line for line in program.splitlines() if BUNDLE.match(line)), "")
    pattern = r"operator input \d+\. The window shape is ([a-z]+)(\d+)\w*\[([\d,]*)\]"
    windows = []
    for kind, bits, shape in re.findall(pattern, entry):
        sizes = tuple(int(n) for n in shape.split(",") if n)
        windows.append((kind + bits, sizes, math.prod(sizes) * int(bits) // 8))
    return windows


def _around(program, leaves):
    """Count bundles in a loop that belong to no leaf, all branches taken: an upper bound."""
    looped = {
        int(m[1] or "0", 16) for m in map(BUNDLE.match, program.splitlines()) if m and m[2].strip()
    }
    for leaf in leaves:
        looped -= set(range(leaf.first, leaf.last + 1))
    return len(looped)


def _leaves(regions):
    """The innermost regions with matrix instructions."""
    working = [r for r in regions if r.matrix]
    most = max((r.matrix for r in working), default=0)

    def own(region):
        return region.matrix - sum(r.matrix for r in region.inside)

    busy = [r for r in working if r.matrix > 0.02 * most and own(r) > r.matrix / 2]
    # regions overlap where the compiler merged blocks: one that contains another is no leaf
    return [
        r for r in busy if not any(r.first <= x.first and x.last <= r.last for x in busy if x != r)
    ]


def _hot(leaves, capacity):
    floors = [
        {unit: -(-n // capacity[unit]) for unit, n in sorted(r.slots.items()) if n} for r in leaves
    ]
    hot = [
        Hot(r.first, r.bundles, r.loops, r.matmuls, f) for r, f in zip(leaves, floors, strict=True)
    ]
    return sorted(hot, key=lambda h: h.bundles)


def read(program: str, table: str, name: str) -> tuple[list[Region], dict[str, int]]:
    """Read the regions of a program, and the slots that a bundle has for each unit."""
    units, capacity, rows = _table(table, name)
    regions: dict[int, Region] = {}
    stack: list[Region] = []
    last, matmuls = -1, []
    for line in program.splitlines():
        bundle = BUNDLE.match(line)
        if not bundle:
            continue
        index = int(bundle[1] or "0", 16)
        if index != last + 1:
            raise ValueError(f"{name}: bundle {index} follows {last}; the format changed")
        last = index
        matmuls.append(len(MATMUL.findall(line)))
        for kind, ident in MARK.findall(line):
            if kind == "Start":
                region = Region(int(ident), index, parent=stack[-1] if stack else None)
                region.loops = bundle[2].count(">")
                regions[int(ident)] = region
                stack.append(region)
            elif int(ident) in regions:
                regions[int(ident)].last = index
                stack = [r for r in stack if r.ident != int(ident)]
    if not 0 <= len(rows) - last - 1 <= 4:
        raise ValueError(f"{name}: {len(rows)} rows for {last + 1} bundles; format changed")
    whole = [r for r in regions.values() if r.last >= 0]
    for region in whole:
        span = rows[region.first : region.last + 1]
        region.slots = {unit: sum(row[i] for row in span) for i, unit in enumerate(units)}
        region.matmuls = sum(matmuls[region.first : region.last + 1])
        if region.parent is not None:
            region.parent.inside.append(region)
    return whole, dict(zip(units, capacity, strict=True))


def _table(text, name):
    lines = text.splitlines()
    if len(lines) < 5 or not lines[3].startswith("== UTILIZATION"):
        raise ValueError(f"{name} has no table of bundle utilization; the format changed")
    units = [unit.strip() for unit in lines[1].split(",")]
    if not set(units) & set(MATRIX):
        raise ValueError(f"{name} counts no matrix unit among {units}; the format changed")
    capacity = [int(n) for n in lines[2].split()]
    rows = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
    return units, capacity, rows
