# SPDX-License-Identifier: Apache-2.0
"""Evaluates a candidate: times it on the device that is here, or reads its machine code.

Each chip has a process of its own for the machine code (`python -m jaxcp.tune.evaluate`), which
reads candidates as lines of JSON and answers each with a line: a compiler reads its flags only
once, and one that dies ends its own process alone.
"""

import dataclasses
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from jaxcp.accelerators import device_files
from jaxcp.compile import gpu_code, machine_code
from jaxcp.tune import gpu_cost
from jaxcp.tune.inputs import fill
from jaxcp.tune.parts import TARGETS, Part, kernel_of, part_of
from pallas_kernels.devices import find
from pallas_kernels.dispatch import trying

ROUNDS = 20
"""Runs of a candidate whose median counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A part to tune, for a target, at a shape and dtype."""

    op: str
    target: str
    part: str
    shape: Mapping[str, int]
    dtype: str

    @property
    def about(self) -> Part:
        return part_of(self.op, self.target, self.part)


class OutOfTime(Exception):
    """The limit was reached before an answer came."""


def present(target: str) -> str | None:
    """The kind of the target's device on this machine, or None.

    Asks jax only where /dev has devices: without any, libtpu searches for a long time.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not device_files():
        return None
    kind = jax.devices()[0].device_kind
    chip = find(kind)
    return kind if chip and chip.name in TARGETS[target].chips else None


class Timed:
    """Times a part's program on the default device: medians in milliseconds."""

    by, unit = "time", "ms"

    def __init__(self, problem: Problem):
        self.part, self.problem = problem.about, problem
        dtype = jnp.dtype(problem.dtype)
        self.shipped = self.part.shipped(problem.shape, dtype)
        self.fn, args = self.part.problem(problem.shape, dtype)
        self.args = fill(self.fn, args)
        self.versions = versions()

    def __call__(self, blocks: Any, deadline: float) -> dict:
        if time.monotonic() > deadline:
            raise OutOfTime
        try:
            with trying(self.part.name, blocks):
                run = jax.jit(self.fn)
                jax.block_until_ready(run(*self.args))
                seconds = []
                for _ in range(ROUNDS):
                    start = time.perf_counter()
                    jax.block_until_ready(run(*self.args))
                    seconds.append(time.perf_counter() - start)
        except Exception as error:  # a candidate that cannot is refused, with the reason
            return {"refused": _said(error)}
        said = f"{min(seconds) * 1e3:.3f} to {max(seconds) * 1e3:.3f} ms in {ROUNDS} runs"
        return {"cost": statistics.median(seconds) * 1e3, "tie": 0.0, "detail": said}

    def close(self) -> None:
        pass


class Coded:
    """Costs a part's machine code for a chip that need not be there."""

    by = "code"

    def __init__(self, problem: Problem, deadline: float):
        self.problem, self.unit = problem, problem.about.unit
        self._start(deadline)

    def _start(self, deadline):
        # the compilers' files go with it, however the process ends
        self._folder = tempfile.TemporaryDirectory(prefix="jaxcp-tune-")
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jaxcp.tune.evaluate",
                json.dumps(dataclasses.asdict(self.problem)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "TMPDIR": self._folder.name},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._asked, self._said = self._process.stdin, self._process.stdout
        first = self._answer(deadline)
        if "failed" in first:
            self.close()
            kinds = {x.__name__: x for x in (ImportError, FileNotFoundError, NotImplementedError)}
            raise kinds.get(first["kind"], ValueError)(first["failed"])
        row = type(self.problem.about.tuning.TABLE[0][-1])
        self.shipped, self.versions = row(**first["shipped"]), first["versions"]

    def __call__(self, blocks: Any, deadline: float) -> dict:
        if self._process.poll() is not None:
            self.close()
            self._start(deadline)
        self._asked.write(json.dumps(dataclasses.asdict(blocks)).encode() + b"\n")
        self._asked.flush()
        answer = self._answer(deadline)
        return {"refused": answer["failed"]} if "failed" in answer else answer

    def _answer(self, deadline) -> dict:
        left = max(0.0, deadline - time.monotonic())
        if not select.select([self._said], [], [], left)[0]:
            self.close()
            raise OutOfTime
        if line := self._said.readline():
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return {"failed": f"the compiler died with {code}: {' '.join(last)}", "kind": "died"}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._folder.cleanup()


def versions() -> dict[str, str]:
    installed = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not there"
    return installed


def code_cost(problem: Problem, compiler: machine_code.Compiler, blocks: Any) -> dict:
    """Cost the blocks: `{"cost", "tie", "detail"}`, or `{"refused"}`."""
    part = problem.about
    try:
        with trying(part.name, blocks):
            done = compiler(*part.problem(problem.shape, jnp.dtype(problem.dtype)))
        kernel = kernel_of(part, done.kernels)
        if isinstance(kernel, gpu_code.Kernel):
            if reason := gpu_cost.refused(kernel):
                return {"refused": reason}
            detail = f"{kernel.registers} registers, {kernel.loops[0].per_matrix:.2f} a matrix"
        else:
            detail = " and ".join(f"{hot.bundles:,}" for hot in kernel.hot[:2]) + " bundles"
        itemsize = jnp.dtype(problem.dtype).itemsize
        cost, tie = part.cost(part, compiler.chip, kernel, blocks, problem.shape, itemsize)
        return {"cost": cost, "tie": tie, "detail": detail}
    except Exception as error:  # a candidate that cannot is refused, with the reason
        return {"refused": _said(error)}


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"


def main(request: str) -> None:
    """Answer the candidates on stdin, one line each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a compiler's output must not come between the answers

    def answer(**said):
        print(json.dumps(said), file=answers, flush=True)

    problem = Problem(**json.loads(request))
    part = problem.about
    try:
        compiler = machine_code.Compiler(TARGETS[problem.target].chips[0])
        with compiler.here():
            shipped = part.shipped(problem.shape, jnp.dtype(problem.dtype))
    except Exception as error:
        return answer(failed=str(error), kind=type(error).__name__)
    tools = versions()
    if part.implementation == "triton":
        tools |= {tool: gpu_code.tool_version(tool) for tool in gpu_code.TOOLS}
    answer(shipped=dataclasses.asdict(shipped), versions=tools)
    try:
        for line in sys.stdin:
            blocks = dataclasses.replace(shipped, **json.loads(line))
            answer(**code_cost(problem, compiler, blocks))
    finally:
        compiler.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
