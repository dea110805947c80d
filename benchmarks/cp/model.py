# SPDX-License-Identifier: Apache-2.0
"""Predicted time of one attention layer over a slice, strategy by strategy.

A layer is steps. In each a rank runs kernels and what XLA does around them, while data travels:

    compute(rank, step) = (blocks worked on x bundles + blocks skipped x bundles) / clock + glue
    end(rank, step)     = max(begin + compute, max(begin, begin of the sender) + wire)
    layer               = exchanges before and after + end of the last step, of the slowest rank

* bundles: of the kernel that really runs, or the matrix units' own time where that is longer
  (`jaxcp/tune/tpu_cost.py`); clock: the one that tokamax's published medians imply.
* skipped blocks: our grid holds them; the shortest way through the kernel's loop (`skipping.py`).
* blocks: sorted out by the kernel's own rule from each rank's positions (`tiles.py`).
* glue: what XLA does between kernels, counted on the compiled program (`glue.py`): its bytes over
  HBM's rate, a least time. Grows with the tokens of a device.
* wire: bytes over the fullest link (`links.py`).

What overlaps is an assumption, of each strategy here and of tokamax's ring alike; a test elsewhere
reads it off the compiled schedule.

* Ring, USP: the rotation of a step runs beside its kernel (`circulate.py` issues it before); n - 1
  rotations. Backward: dK and dV follow one step behind, and their last hop home waits.
* Ring(bidirectional=True): halves go both ways at once, in two kernel calls a step, so with twice
  the glue (an upper bound).
* Ring(fused=True): the same steps in one kernel, no glue between them. A kernel without a grid runs
  on one of v5p's two cores.
* AllGather: nothing overlaps, and the links are used as well as can be (where XLA reduces dK and
  dV by all-reduce it sends twice that). In chunks, on tpu7x: a part travels beside the kernel on
  the part before, and waits for the slowest rank of it. XLA's all-gather waits on v5p and v6e.
* Ulysses, USP: the exchanges wait. USP's glue is that of a ring's turns and of Ulysses' exchange.
* tokamax: contiguous shards, n rotations, of which the last forward one is not needed and free.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from benchmarks.cp import tiles
from benchmarks.cp.links import Torus
from benchmarks.cp.programs import HEAD_DIM, HEADS, KV_HEADS, SPLASH
from jaxcp.context_parallel import Shapes, Ulysses
from jaxcp.context_parallel.exchange import exchanged_shapes
from jaxcp.layout import Zigzag
from pallas_kernels.devices import CHIPS

BFLOAT16, FLOAT32 = 2, 4
PASSES = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds: `kernel` `[3, ranks]` as `tiles.seconds` gives it, `glue`; `wire` beside them."""

    kernel: np.ndarray
    glue: float
    wire: float = 0.0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """`alone`: seconds of collectives that nothing runs beside. `stride`: who sends to whom."""

    steps: list[Step]
    alone: float = 0.0
    stride: int = 1


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of the slowest rank: blocks worked on, the matrix units' part of that, blocks
    skipped, glue; and of `wire`, all transfers.
    """

    total: float
    works: float
    matrix: float
    skips: float
    glue: float
    wire: float

    def __add__(self, other):
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Time(*(a + b for a, b in pairs))

    @property
    def limit(self) -> str:
        """The part that takes most of the time; wire counts where it is not hidden."""
        shares = {
            "MXU" if self.matrix > 0.97 * self.works else "bundles": self.works,
            "skipping": self.skips,
            "glue": self.glue,
            "wire": self.total - self.works - self.skips - self.glue,
        }
        return max(shares, key=lambda name: shares[name])


def play(schedule: Schedule) -> Time:
    """Run a schedule: a rank waits for its own kernel and for what its neighbour sends it."""
    end = np.zeros(schedule.steps[0].kernel.shape[1])
    for step in schedule.steps:
        done = end + step.kernel[0] + step.kernel[2] + step.glue
        if step.wire:
            done = np.maximum(done, np.maximum(end, np.roll(end, schedule.stride)) + step.wire)
        end = done
    rank = int(np.argmax(end))
    works, matrix, skips = sum(step.kernel[:, rank] for step in schedule.steps)
    return Time(
        total=float(end[rank]) + schedule.alone,
        works=float(works),
        matrix=float(matrix),
        skips=float(skips),
        glue=sum(step.glue for step in schedule.steps),
        wire=schedule.alone + sum(step.wire for step in schedule.steps),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A slice, tokens a device, and what was compiled for its chip."""

    torus: Torus
    tokens: int
    found: list[dict]
    bounded: bool = True

    @property
    def chip(self) -> str:
        return self.torus.chip.name

    @property
    def ranks(self) -> int:
        return len(self.torus.devices)

    @functools.cached_property
    def positions(self) -> np.ndarray:
        return Zigzag().order(self.ranks * self.tokens, self.ranks).reshape(self.ranks, -1)

    def row(self, strategy: str, whose: str = "ours") -> dict:
        """The row that was compiled, for as many devices if there is one."""
        rows = [r for r in self.found if r["strategy"] == strategy and r["whose"] == whose]
        good = [r for r in rows if "kernels" in r]
        if not good:
            said = "; ".join(r["error"] for r in rows) or "not compiled"
            raise ValueError(f"{whose} {strategy} on {self.chip}: {said}")
        return min(good, key=lambda r: abs(r["devices"] - self.ranks))

    def glue(self, strategy: str, what: str, part: str, whose: str = "ours") -> float:
        row = self.row(strategy, whose)
        nbytes = row["glue"][what][part]["hbm_bytes"] * self.tokens / row["tokens"]
        chip = CHIPS[self.chip]
        return nbytes / (chip.hbm_bytes_per_second / chip.devices_per_chip)

    def costs(self, strategy: str, what: str) -> tiles.Costs:
        own, alone = self.row(strategy), self.row("kernels")
        name = f"flash_attention_{what}"
        _, _, queries, keys, *_ = alone["kernels"][name]["windows"]
        size = queries[1][-2], keys[1][-2]
        kernel = own["kernels"][f"ring_attention_{what}" if "fused" in strategy else name]
        skip = alone["skips"][name]
        return tiles.costs(self.chip, kernel, what, *size, bounded=self.bounded, skip=skip)

    @property
    def shapes(self) -> Shapes:
        return Shapes(
            shards=self.ranks,
            tokens=self.tokens,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            itemsize=BFLOAT16,
        )

    def keys_bytes(self, itemsize: int) -> int:
        """K and V of a shard."""
        return dataclasses.replace(self.shapes, itemsize=itemsize).kv_bytes


def schedules(case: Case) -> dict:
    """`{label: function of "forward" or "backward"}`, every strategy that the heads allow."""
    by_label = {
        "Ring()": functools.partial(ring, case),
        "Ring(bidirectional=True)": functools.partial(ring, case, both_ways=True),
        "AllGather()": functools.partial(all_gather, case),
        "AllGather(chunks=4)": functools.partial(all_gather, case, chunks=4),
    }
    if any(row["strategy"] == "Ring(fused=True)" for row in case.found):
        by_label["Ring(fused=True)"] = functools.partial(fused, case)
    for u in (2, 4, 8, 16, 32):
        if u < case.ranks and case.ranks % u == 0 and HEADS % u == 0:
            by_label[f"USP(ulysses={u})"] = functools.partial(usp, case, ulysses=u)
    if HEADS % case.ranks == 0:
        by_label["Ulysses()"] = functools.partial(ulysses, case)
    return by_label


def ring(case: Case, what: str, *, both_ways: bool = False) -> Schedule:
    wires = [case.torus.rotation(case.keys_bytes(size), 1, both_ways) for size in (2, 4)]
    streams = np.split(case.positions, 2, axis=1) if both_ways else [case.positions]
    kernels = [
        sum(
            tiles.seconds(
                case.chip,
                case.costs("Ring", what),
                case.positions,
                np.roll(keys, -step if i else step, axis=0),
                HEADS,
            )
            for i, keys in enumerate(streams)
        )
        for step in range(case.ranks)
    ]
    return _circle(case, what, kernels, wires, len(streams))


def fused(case: Case, what: str) -> Schedule:
    wires = [case.torus.rotation(case.keys_bytes(size)) for size in (2, 4)]
    name = "Ring(fused=True)"
    glue = sum(case.glue(name, what, part) for part in ("once", "turn"))
    steps, last = [], case.ranks - 1
    for step in range(case.ranks):
        keys, costs = np.roll(case.positions, step, axis=0), case.costs(name, what)
        kernel = tiles.seconds(case.chip, costs, case.positions, keys, HEADS, cores=1)
        wire = wires[0] if step < last else 0.0
        if what == "backward" and step > 1:
            wire += wires[1]
        steps.append(Step(kernel, 0.0 if step < last else glue, wire))
    return Schedule(steps, alone=wires[1] if what == "backward" and last else 0.0)


def _circle(case, what, kernels, wires, calls=1, stride=1, alone=0.0, glue=0.0) -> Schedule:
    """Steps of `circulate.py`: what travels beside each kernel, and what waits at the end."""
    last = len(kernels) - 1
    turn, once = (case.glue("Ring", what, part) * calls for part in ("turn", "once"))
    if what == "backward":  # the first two turns and the last stand outside of the loop
        once = max(0.0, once - 2 * turn)
    steps = []
    for step, kernel in enumerate(kernels):
        wire = wires[0] if step < last else 0.0
        if what == "backward" and step > 1:
            wire += wires[1]
        here = turn if step < last else once + glue
        steps.append(Step(kernel, here, wire))
    if what == "backward" and last:
        alone += wires[1]
    return Schedule(steps, alone, stride)


def all_gather(case: Case, what: str, *, chunks: int = 1) -> Schedule:
    n, parts = case.ranks, np.split(case.positions, chunks, axis=1)
    itemsize = BFLOAT16 if what == "forward" else FLOAT32  # dK and dV are summed in float32
    wire = case.torus.gather(case.keys_bytes(itemsize) / chunks)
    beside = case.chip == "tpu7x"
    glue = sum(case.glue("AllGather", what, part) for part in ("once", "turn"))
    if chunks > 1:
        glue = (case.glue("Ring", what, "turn") * chunks) if what == "forward" else glue
    steps = []
    for i, part in enumerate(parts):
        keys = np.broadcast_to(part.reshape(-1), (n, part.size))
        name = "AllGather" if chunks == 1 else "Ring"  # with a carry or without
        costs = case.costs(name, what)
        kernel = tiles.seconds(case.chip, costs, case.positions, keys, HEADS)
        # forward the next part arrives beside this one's kernel, backward the last one's leaves
        hidden = beside and (i < chunks - 1 if what == "forward" else i > 0)
        steps.append(Step(kernel, glue / chunks, wire if hidden else 0.0))
    return Schedule(steps, alone=wire if beside else chunks * wire)


def _exchange(case: Case, size: int) -> float:
    """Seconds of a pass's all-to-alls, those of the forward pass."""
    cost = Ulysses().cost(dataclasses.replace(case.shapes, shards=size))
    (swaps,) = [x.bytes for x in cost.forward if x.kind == "all-to-all"]
    return case.torus.exchange(swaps / size, size)


def ulysses(case: Case, what: str) -> Schedule:
    every = case.positions.reshape(1, -1)
    heads = HEADS // case.ranks
    kernel = tiles.seconds(case.chip, case.costs("Ulysses", what), every, every, heads)
    glue = sum(case.glue("Ulysses", what, part) for part in ("once", "turn"))
    return Schedule([Step(kernel, glue)], alone=_exchange(case, case.ranks))


def usp(case: Case, what: str, *, ulysses: int) -> Schedule:
    n = case.ranks
    held = case.positions.reshape(n // ulysses, -1)  # tokens of a group, on each device of it
    held = np.repeat(held, ulysses, axis=0)
    kernels = [
        tiles.seconds(
            case.chip,
            case.costs("Ring", what),
            held,
            np.roll(held, step * ulysses, axis=0),
            HEADS // ulysses,
        )
        for step in range(n // ulysses)
    ]
    inner = exchanged_shapes(case.shapes, ulysses)
    wires = [
        case.torus.rotation(dataclasses.replace(inner, itemsize=size).kv_bytes, ulysses)
        for size in (2, 4)
    ]
    swaps = sum(case.glue("Ulysses", what, part) for part in ("once", "turn"))
    swaps = max(0.0, swaps - case.glue("Ring", what, "turn"))
    alone = _exchange(case, ulysses)
    return _circle(case, what, kernels, wires, 1, ulysses, alone, swaps)


def tokamax(case: Case, what: str) -> Schedule:
    """tokamax's ring: the same cost model, its own kernel, order and rotations."""
    n, row = case.ranks, case.row("ring", "tokamax")
    name = "splash_mha_fwd_residuals" if what == "forward" else "splash_mha_dkv_no_residuals"
    blocks = SPLASH[what]
    costs = tiles.costs(case.chip, row["kernels"][name], what, blocks.q, blocks.kv)
    positions = np.arange(n * case.tokens).reshape(n, -1)
    turn = case.glue("ring", what, "once", "tokamax") / row["devices"]
    wires = [case.torus.rotation(case.keys_bytes(size)) for size in (2, 4)]
    steps = []
    for step in range(n):
        keys = np.roll(positions, step, axis=0)
        kernel = tiles.seconds(case.chip, costs, positions, keys, HEADS)
        wire = wires[0] if step < n - 1 else 0.0
        if what == "backward" and step:
            wire += wires[1]
        steps.append(Step(kernel, turn, wire))
    return Schedule(steps, alone=wires[1] if what == "backward" else 0.0)


def times(case: Case) -> Iterator[tuple[str, str, dict[str, Time] | str]]:
    """`(whose, label, {"forward", "backward"} or why not)` of everything that is compared."""
    rows = {("ours", label): f for label, f in schedules(case).items()}
    rows["tokamax", "ring"] = functools.partial(tokamax, case)
    for (whose, label), schedule in rows.items():
        try:
            yield whose, label, {what: play(schedule(what)) for what in PASSES}
        except ValueError as error:
            yield whose, label, str(error)
