# SPDX-License-Identifier: Apache-2.0
"""What a compiled program sends and which kernels it calls, read from its HLO text.

Knows the text that XLA prints for CPU, CUDA and TPU in jax 0.10 to 0.12. Counts are executions:
an instruction in a loop counts once a turn where the number of turns is in the text.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("collective-permute", "all-gather", "reduce-scatter", "all-reduce", "all-to-all")
KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call", "mosaic_gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All executions of one kind of collective.

    `bytes` is summed over them, per device: what is sent by a permute, else the larger of operand
    and result (the gathered, reduced or exchanged array). `note` says what loops were counted.
    """

    kind: str
    count: int
    bytes: int
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: str
    attributes: str

    @property
    def inputs(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.operands)

    def callees(self) -> list[str]:
        if self.opcode.endswith(("-done", "-update")):  # newer XLA repeats what -start calls
            return []
        names = "calls|to_apply|true_computation|false_computation"
        one = re.findall(rf"\b(?:{names})=%([\w.\-]+)", self.attributes)
        many = re.findall(
            r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes
        )
        return one + [name for group in many for name in re.findall(r"%([\w.\-]+)", group)]


@dataclasses.dataclass(frozen=True)
class _Use:
    """An instruction as the program runs it: how often, and in what loops (None: not known)."""

    instruction: _Instruction
    operand_bytes: int
    count: int
    loops: tuple[int | None, ...]


def collectives(hlo_text: str) -> list[Collective]:
    """One row a kind of collective that the program executes, in the order of `KINDS`.

    A start and its done are one. A loop whose number of turns is not in the text counts as one
    turn and is named in `note`; every branch of a conditional counts.

    >>> [c.count for c in collectives(compiled.as_text()) if c.kind == "collective-permute"]
    """
    found: dict[str, list[_Use]] = {}
    for use in _uses(hlo_text):
        opcode = use.instruction.opcode
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            found.setdefault(kind, []).append(use)
    return [
        Collective(
            kind=kind,
            count=sum(use.count for use in found[kind]),
            bytes=sum(use.count * _payload(use) for use in found[kind]),
            note=_note(found[kind]),
        )
        for kind in KINDS
        if kind in found
    ]


def kernel_calls(hlo_text: str) -> int:
    """Executions of Mosaic and Triton kernels, counted as `collectives` counts."""
    return sum(
        use.count
        for use in _uses(hlo_text)
        if use.instruction.opcode == "custom-call"
        and (target := re.search(r'custom_call_target="([^"]*)"', use.instruction.attributes))
        and target[1].startswith(KERNEL_TARGETS)
    )


def _payload(use: _Use) -> int:
    result = use.instruction.type
    if use.instruction.opcode.endswith("-start"):
        # A start returns (operands, results, u32[] contexts), or for some the results alone.
        size = _bytes(re.sub(r"[us]32\[\](\{[^}]*\})?", "", result))
        return max(use.operand_bytes, size - use.operand_bytes)
    return max(use.operand_bytes, _bytes(result))


def _note(uses: list[_Use]) -> str:
    known = sorted({math.prod(n for n in use.loops if n) for use in uses if any(use.loops)})
    notes = [f"in loops of {', '.join(map(str, known))} turns"] if known else []
    if any(None in use.loops for use in uses):
        notes.append("a loop of unknown length counted once")
    return "; ".join(notes)


def _bytes(type_text: str) -> int:
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_text):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
        total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
    return total


def _uses(hlo_text: str) -> Iterator[_Use]:
    """Every collective and custom call that is reached from the entry computation."""
    computations, entry = _parse(hlo_text)

    def walk(name: str, count: int, loops: tuple[int | None, ...]) -> Iterator[_Use]:
        body = computations.get(name, {})
        for instruction in body.values():
            if instruction.opcode.removesuffix("-start") in (*KINDS, "custom-call"):
                operands = sum(_bytes(body[x].type) for x in instruction.inputs if x in body)
                yield _Use(instruction, operands, count, loops)
            elif instruction.opcode == "while":
                turns = _turns(computations, body, instruction)
                inner = _attribute(instruction, "body")
                yield from walk(inner, count * (1 if turns is None else turns), (*loops, turns))
            else:
                for callee in instruction.callees():
                    yield from walk(callee, count, loops)

    yield from walk(entry, 1, ())


def _parse(hlo_text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, body = "", None
    for line in hlo_text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            body = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif body is not None and (start := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)):
            instruction = _instruction(start[1], line[start.end() :])
            body[instruction.name] = instruction
    if not entry:
        raise ValueError("expected the text of a compiled HLO module; found no ENTRY computation")
    return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
    cut = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opening = text.index("(", cut)
    closing = _closing(text, opening)
    return _Instruction(
        name=name,
        type=text[:cut],
        opcode=text[cut:opening].strip(),
        operands=text[opening:closing],
        attributes=text[closing:],
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    return len(text)


def _attribute(instruction: _Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%([\w.\-]+)", instruction.attributes)
    return found[1] if found else ""


def _turns(computations, body, loop: _Instruction) -> int | None:
    """Turns of a while loop: what XLA notes, else `i < n` from 0, as JAX writes its loops.

    libtpu drops XLA's note, so on TPU only the second way is left.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted[1])
    condition = computations.get(_attribute(loop, "condition"), {})
    inside = computations.get(_attribute(loop, "body"), {})
    before = body.get(loop.inputs[0]) if loop.inputs else None
    if not condition or not inside or before is None or before.opcode != "tuple":
        return None
    root = list(condition.values())[-1]
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    index, limit = (_element_or_constant(condition, name) for name in root.inputs)
    if not isinstance(index, _Element):
        return None

    def initial(element):
        found = _element_or_constant(body, before.inputs[element.index])
        return found if isinstance(found, int) else None

    limit = initial(limit) if isinstance(limit, _Element) else limit
    first, step = initial(index), _step(inside, index)
    return -(-(limit - first) // step) if None not in (limit, first, step) else None


@dataclasses.dataclass(frozen=True)
class _Element:
    """An element of a computation's parameter tuple."""

    index: int


def _element_or_constant(computation, name: str) -> "_Element | int | None":
    while (instruction := computation.get(name)) and instruction.opcode in ("copy", "bitcast"):
        name = instruction.inputs[0]
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        value = re.fullmatch(r"\((-?\d+)\)", instruction.operands)
        return int(value[1]) if value else None
    if instruction.opcode == "get-tuple-element":
        index = re.search(r"\bindex=(\d+)", instruction.attributes)
        return _Element(int(index[1])) if index else None
    return None


def _step(inside, index: _Element) -> int | None:
    after = list(inside.values())[-1]
    added = inside.get(after.inputs[index.index]) if after.opcode == "tuple" else None
    if added is None or added.opcode != "add":
        return None
    parts = [_element_or_constant(inside, name) for name in added.inputs]
    steps = [part for part in parts if isinstance(part, int) and part > 0]
    return steps[0] if index in parts and steps else None
