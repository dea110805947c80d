# SPDX-License-Identifier: Apache-2.0
"""Read an NVIDIA kernel: registers, spills and shared memory by ptxas, its loops by nvdisasm.

XLA writes the PTX of a compiled program when `dump_flags` are in XLA_FLAGS before jax is imported.
"""

import collections
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sysconfig
import tempfile
from importlib import metadata

TOOLS = ("ptxas", "nvdisasm")


def dump_flags(folder) -> str:
    flags = f"--xla_dump_to={folder} --xla_gpu_dump_llvmir=true"
    # the code that a user gets, whatever XLA_FLAGS asked for before: the last one counts
    flags += " --xla_backend_optimization_level=3 --xla_llvm_disable_expensive_passes=false"
    # since jax 0.11 what an emitter makes is only written for those that are named
    modern = tuple(map(int, metadata.version("jaxlib").split(".")[:2])) >= (0, 11)
    return flags + " --xla_dump_emitter_re=ptx" if modern else flags


MATRIX = re.compile(r"[A-Z]*MMA$")  # HMMA, IMMA, QMMA, OMMA, HGMMA ...


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop body; `opcodes` counts its instructions, without their modifiers."""

    opcodes: dict[str, int]

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def matrix(self) -> int:
        return sum(n for op, n in self.opcodes.items() if MATRIX.match(op))

    @property
    def per_matrix(self) -> float:
        return self.instructions / self.matrix


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One entry point. `loops`: innermost ones with matrix instructions, the leanest first."""

    name: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int  # static; what a launch adds is not in the machine code
    matrix_names: tuple[str, ...]  # names in the PTX: mma.sync.aligned.m16n8k16...
    loops: tuple[Loop, ...]


def kernels(folder: pathlib.Path) -> dict[str, Kernel]:
    """Read the kernels with matrix instructions that XLA wrote into `folder`, by name."""
    by_name: dict[str, Kernel] = {}
    for path in sorted(folder.rglob("*.ptx")):
        if "mma." in path.read_text():
            by_name |= {kernel.name: kernel for kernel in _assemble(path) if kernel.matrix_names}
    return by_name


def _assemble(path: pathlib.Path) -> list[Kernel]:
    ptx = path.read_text()
    target = re.search(r"^\.target\s+(sm_\w+)", ptx, re.MULTILINE)
    if target is None:
        raise ValueError(f"{path} names no .target; is it PTX?")
    with tempfile.TemporaryDirectory() as scratch:
        cubin = f"{scratch}/kernel.cubin"
        report = _run("ptxas", "-v", f"-arch={target[1]}", str(path), "-o", cubin).stderr
        code = _run("nvdisasm", "-c", cubin).stdout
    bodies = dict(re.findall(r"^\.entry\s+([\w$]+)(.*?)^\}", _entries(ptx), re.S | re.M))
    kernels = []
    for section in re.split(r"(?=^\s*\.section\s+\.text\.)", code, flags=re.M)[1:]:
        titled = re.match(r"\s*\.section\s+\.text\.([\w$]+)", section)
        assert titled is not None  # the split left it
        name = titled[1]
        about = re.search(
            rf"entry function '{re.escape(name)}'.*?(?=Compiling entry|\Z)", report, re.S
        )
        if about is None:
            continue  # a device function
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", about[0])]
        kernels.append(
            Kernel(
                name=name,
                arch=target[1],
                registers=_number(r"Used (\d+) registers", about[0]),
                spilled_bytes=max(spills, default=0),
                shared_bytes=_number(r"(\d+) bytes smem", about[0]),
                matrix_names=tuple(sorted(set(matrix_names(bodies.get(name, ""))))),
                loops=tuple(matrix_loops(section)),
            )
        )
    return kernels


def _entries(ptx: str) -> str:
    return re.sub(r"^(?:\.visible\s+)?\.entry", ".entry", ptx, flags=re.M)


def matrix_names(body: str) -> list[str]:
    """List the matrix instructions of a kernel's PTX."""
    return re.findall(r"\b((?:mma|wgmma)\.[\w.:]+)", body)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def matrix_loops(section: str) -> list[Loop]:
    """Find innermost loops with matrix instructions: a label up to the last branch back to it."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for line in section.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\w+):", line):
            labels[label[1]] = len(opcodes)
            continue
        said = re.sub(r"/\*.*?\*/", "", line).strip().removeprefix("{").strip()
        code = re.match(r"(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)\b", said)
        if not code:
            continue
        opcodes.append(code[1])
        target = re.search(r"`\((\.L_x?_?\w+)\)", said)
        if code[1] == "BRA" and target and target[1] in labels:
            ends[labels[target[1]]] = len(opcodes)
    spans = [(a, b) for a, b in ends.items() if any(map(MATRIX.match, opcodes[a:b]))]
    inner = [
        (a, b)
        for a, b in spans
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]
    loops = [Loop(dict(collections.Counter(opcodes[a:b]))) for a, b in inner]
    return sorted(loops, key=lambda loop: loop.per_matrix)


def _run(tool: str, *args: str) -> subprocess.CompletedProcess:
    done = subprocess.run([find_tool(tool), *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} {' '.join(args)}: {done.stderr[-2000:]}")
    return done


@functools.cache
def find_tool(name: str) -> str:
    """Find a CUDA tool in the wheels of this environment, or on PATH.

    Raises:
      FileNotFoundError: it is in neither.
    """
    for root in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in sorted(pathlib.Path(root, "nvidia").glob(f"**/bin/{name}")):
            if os.access(path, os.X_OK):
                return str(path)
    if on_path := shutil.which(name):
        return on_path
    raise FileNotFoundError(
        f"reading a GPU's machine code needs {name}, which is not installed: "
        "pip install jaxcp[tune]  (nvidia-cuda-nvcc and nvidia-cuda-nvdisasm)"
    )


def tool_version(name: str) -> str:
    text = _run(name, "--version").stdout
    match = re.search(r"release ([\d.]+), V([\d.]+)", text)
    return match[2] if match else text.strip().splitlines()[-1]
