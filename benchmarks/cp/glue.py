# SPDX-License-Identifier: Apache-2.0
"""Counts the work of XLA between the kernels of a compiled TPU program: copies, sums, casts.

A TensorCore runs one thing at a time, so this is added to the kernels. Counts the bytes that each
operation reads and writes in HBM (arrays in VMEM, `S(1)`, are free), and beside them the cycles
that XLA itself expects (`estimated_cycles`). The two are the ends of a range: HBM's full rate is
the least time, and XLA's number is many times that for some reductions.
"""

import dataclasses
import re

from jaxcp.compile.hlo import KERNEL_TARGETS

HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
TYPE_END = re.compile(r" ([a-z][a-z0-9\-]*)\(([^)]*)\)")


@dataclasses.dataclass
class Glue:
    """The work of one pass: `ops` operations, their bytes in HBM, the cycles that XLA expects."""

    ops: int = 0
    hbm_bytes: int = 0
    cycles: int = 0


def read(text: str) -> dict[str, dict[str, Glue]]:
    """`{"forward", "backward": {"once", "turn": Glue}}` of a layer and its gradients.

    "turn" is one turn of the pass's loop, zero where it has none. The backward pass is what JAX
    calls a transpose; an operation without a name belongs to the kernel after it, or the last one.
    """
    passes = {p: {"once": Glue(), "turn": Glue()} for p in ("forward", "backward")}
    for name, lines in _computations(text).items():
        looped = re.search(rf"\bbody=%{re.escape(name)}\b", text) is not None
        if not looped and not lines[0].startswith("ENTRY"):
            continue
        types = {m[1]: m[2] for m in map(LINE.match, lines) if m}
        waiting: list[Glue] = []
        last, part = "forward", "turn" if looped else "once"
        for line in lines[1:]:
            direction = _direction(line)
            if any(f'custom_call_target="{x}' in line for x in KERNEL_TARGETS) and direction:
                _add(passes[direction][part], waiting)
                waiting, last = [], direction
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            if cycles is None:
                continue
            glue = Glue(1, _hbm_bytes(line, types), int(cycles[1]))
            if direction is None:
                waiting.append(glue)
            else:
                _add(passes[direction][part], [glue])
        _add(passes[last][part], waiting)
    return passes


def _computations(text):
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if header := HEADER.match(line):
            lines = bodies.setdefault(header[2], [line])
        elif bodies:
            lines.append(line)
    return bodies


def _direction(line):
    name = re.search(r'op_name="([^"]*)"', line)
    if name is None:
        return None
    return "backward" if "transpose(" in name[1] else "forward"


def _hbm_bytes(line, types):
    match = LINE.match(line)
    assert match is not None
    body = match[2]
    end = TYPE_END.search(body)
    if end is None:
        raise ValueError(f"no instruction in {line[:80]!r}; the text of the program changed")
    operands = re.findall(r"%([\w.\-]+)", end[2])
    size = _bytes(body[: end.start()])
    for operand in operands:
        its = types.get(operand, "")
        cut = TYPE_END.search(its)
        size += _bytes(its[: cut.start()]) if cut else 0
    return size


def _bytes(type_text):
    """Bytes of the arrays of a type that lie in HBM."""
    total = 0
    for dtype, dims, layout in SHAPE.findall(type_text):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
        count = 1
        for n in dims.split(","):
            count *= int(n) if n else 1
        total += 0 if "S(" in layout else count * bits // 8
    return total


def _add(total, parts):
    for part in parts:
        total.ops += part.ops
        total.hbm_bytes += part.hbm_bytes
        total.cycles += part.cycles
