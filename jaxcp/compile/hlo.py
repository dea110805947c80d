# SPDX-License-Identifier: Apache-2.0
"""Reads from the HLO text of a compiled program what it sends and which kernels it calls.

Knows the text that XLA prints for CPU, CUDA and TPU in jax 0.10 to 0.12. Counts are executions:
an instruction in a loop counts once a turn where the number of turns is in the text.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("collective-permute", "all-gather", "reduce-scatter", "all-reduce", "all-to-all")
MOVES = ("copy", "reshape", "transpose", "slice", "dynamic-slice", "concatenate", "gather", "pad")
"""Opcodes that change no value. A reshape that is left in a compiled program moves bytes."""
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")
KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call", "mosaic_gpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All executions of one kind of collective.

    `bytes` is summed over them, per device: a permute counts what it sends, any other the larger of
    operand and result (the gathered, reduced or exchanged array). `note` names the loops counted.
    """

    kind: str
    count: int
    bytes: int
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """One collective of the schedule, run `count` times with `bytes` (as in `Collective`) each.

    `kernels`: Mosaic and Triton kernels that run between its start and its done, and so hide it.
    """

    kind: str
    bytes: int
    count: int
    kernels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """An instruction that only moves, run `count` times: its opcode, and the bytes it writes."""

    opcode: str
    bytes: int
    count: int


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
    """An instruction, how often the program runs it, and the turns of its loops (None: unknown)."""

    instruction: _Instruction
    operand_bytes: int
    count: int
    loops: tuple[int | None, ...]


def collectives(hlo_text: str) -> list[Collective]:
    """Count the collectives that the program executes, one row a kind, in the order of `KINDS`.

    A start and its done are one. A loop whose number of turns is not in the text counts as one
    turn and is named in `note`; every branch of a conditional counts.

    >>> [c.count for c in collectives(compiled.as_text()) if c.kind == "collective-permute"]
    """
    uses: dict[str, list[_Use]] = {}
    for use in _uses(hlo_text):
        if kind := _kind(use.instruction):
            uses.setdefault(kind, []).append(use)
    return [
        Collective(
            kind=kind,
            count=sum(use.count for use in uses[kind]),
            bytes=sum(use.count * _payload(use) for use in uses[kind]),
            note=_note(uses[kind]),
        )
        for kind in KINDS
        if kind in uses
    ]


def kernel_calls(hlo_text: str) -> int:
    """Count the executions of Mosaic and Triton kernels, as `collectives` counts."""
    return sum(use.count for use in _uses(hlo_text) if _is_kernel(use.instruction))


def transfers(hlo_text: str) -> list[Transfer]:
    """List the collectives in the order of the schedule (`is_scheduled=true`), a loop's body once.

    Combined collectives are one. A start that XLA marks synchronous hides behind nothing.

    >>> all(t.kernels for t in transfers(compiled.as_text()) if t.kind == "collective-permute")
    """
    computations, entry = _parse(hlo_text)
    schedule: list[Transfer] = []
    for name, count, loops in _sequences(computations, entry):
        body, kernels = computations[name], 0
        begun: dict[str, tuple[int, int]] = {}  # index in `schedule`, and kernels before
        for instruction in body.values():
            kernels += _kernels_in(computations, instruction)
            # a start of another kind wraps the collective in a computation
            inner = [
                use
                for use in _walk(computations, {instruction.name: instruction}, count, loops, body)
                if _kind(use.instruction)
            ]
            if instruction.opcode.endswith("-done") and instruction.inputs:
                if start := begun.pop(_origin(body, instruction), None):
                    index, before = start
                    schedule[index] = dataclasses.replace(schedule[index], kernels=kernels - before)
            elif inner and instruction.opcode not in ("while", "conditional", "call"):
                if instruction.opcode.endswith("-start") and '"is_sync":true' not in (
                    instruction.attributes
                ):
                    begun[instruction.name] = len(schedule), kernels
                kind = inner[0].instruction.opcode.removesuffix("-start")
                size = sum(_payload(use) for use in inner)
                schedule.append(Transfer(kind=kind, bytes=size, count=count, kernels=0))
    return schedule


def copies(hlo_text: str, least: int) -> list[Copy]:
    """List instructions that move `least` bytes or more and compute nothing, as scheduled.

    Leaves out moves between memories (a TPU's prefetching into its vector memory) and collectives.
    """
    computations, entry = _parse(hlo_text)
    moved = []
    for name, count, _ in _sequences(computations, entry):
        for x in computations[name].values():
            opcode = x.opcode.removesuffix("-start")
            if opcode in MOVES and x.opcode != opcode:
                ends = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", x.type)[:2]
                moves, size = len({"S(" in end for end in ends}) == 1, _bytes(ends[0])
            else:
                inside = [computations[callee] for callee in x.callees()]
                codes = {y.opcode for body in inside for y in body.values()} - set(FREE)
                wrapped = opcode in ("fusion", "async") and bool(codes) and codes <= set(MOVES)
                moves, size = opcode in MOVES or wrapped, _bytes(x.type)
            if moves and size >= least:
                moved.append(Copy(opcode=opcode, bytes=size, count=count))
    return moved


def _kind(instruction: _Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _is_kernel(instruction: _Instruction) -> bool:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return (
        instruction.opcode == "custom-call"
        and target is not None
        and target[1].startswith(KERNEL_TARGETS)
    )


def _kernels_in(computations, instruction: _Instruction) -> int:
    if instruction.opcode.endswith(("-done", "-update")):
        return 0
    body = {instruction.name: instruction}
    return sum(use.count for use in _walk(computations, body, 1, ()) if _is_kernel(use.instruction))


def _origin(body, done: _Instruction) -> str:
    """The name of the start that a done belongs to, past the updates between them."""
    start = body.get(done.inputs[0])
    while start and start.inputs and start.opcode.endswith(("-update", "get-tuple-element")):
        start = body.get(start.inputs[0])
    return start.name if start else ""


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
    """Walk all collectives and custom calls that are reached from the entry computation."""
    computations, entry = _parse(hlo_text)
    return _walk(computations, computations[entry], 1, ())


def _walk(computations, body, count, loops, around=None) -> Iterator[_Use]:
    """Walk the collectives and custom calls of `body`, with operands from it or from `around`."""
    known = body if around is None else around
    for instruction in body.values():
        if _scatters(computations, instruction):
            instruction = dataclasses.replace(instruction, opcode="reduce-scatter")
        if _kind(instruction) or instruction.opcode == "custom-call":
            operands = sum(_bytes(known[x].type) for x in instruction.inputs if x in known)
            yield _Use(instruction, operands, count, loops)
            continue
        turns: int | None = 1
        inner, callees = loops, instruction.callees()
        if instruction.opcode == "while":
            turns = _turns(computations, known, instruction)
            inner, callees = (*loops, turns), [_attribute(instruction, "body")]
        for callee in callees:
            yield from _walk(
                computations, computations.get(callee, {}), count * (turns or 1), inner
            )


def _scatters(computations, instruction: _Instruction) -> bool:
    """Tell whether a fusion is a TPU's reduce-scatter: it sums everywhere and keeps its part."""
    bodies = [computations.get(callee, {}) for callee in instruction.callees()]
    codes = {x.opcode for body in bodies for x in body.values()}
    return instruction.opcode == "fusion" and {"all-reduce", "dynamic-slice"} <= codes


def _sequences(computations, name, count=1, loops=()):
    """Walk the entry, and the bodies of loops and branches in it: `(computation, count, loops)`."""
    yield name, count, loops
    for instruction in computations[name].values():
        if instruction.opcode == "while":
            turns = _turns(computations, computations[name], instruction)
            body = _attribute(instruction, "body")
            yield from _sequences(computations, body, count * (turns or 1), (*loops, turns))
        elif instruction.opcode in ("conditional", "call"):
            for callee in instruction.callees():
                yield from _sequences(computations, callee, count, loops)


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
    match = re.search(rf"\b{name}=%([\w.\-]+)", instruction.attributes)
    return match[1] if match else ""


def _turns(computations, body, loop: _Instruction) -> int | None:
    """Turns of a while loop: XLA's note of them, else read from `i < n` from 0, as JAX writes it.

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
        value = _element_or_constant(body, before.inputs[element.index])
        return value if isinstance(value, int) else None

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
