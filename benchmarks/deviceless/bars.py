# SPDX-License-Identifier: Apache-2.0
"""The bars, with the count beside each: one row a bar, chip and shape."""

import dataclasses
import math

from jaxcp.tune.tpu_cost import hbm_cycles
from pallas_kernels.devices import CHIPS

INSTRUCTIONS = {64: 5.2, 128: 3.9, 256: 5.6}  # of the hot loop, a matrix instruction
TPUS = ("v5e", "v5p", "v6e", "tpu7x")
GPU = "rtx-pro-6000"
COMPILE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    what: str
    value: float | None  # None: there is nothing to count
    unit: str
    against: str
    bar: float
    detail: str = ""
    also: bool = True  # what the bar asks besides the number

    @property
    def reached(self) -> bool:
        return self.value is not None and self.value <= self.bar and self.also


def rows(counts: list[dict], chips: tuple[str, ...] = (*TPUS, GPU)) -> list[Row]:
    """Every bar of `chips`, with its count."""
    tpus = [chip for chip in TPUS if chip in chips]
    gpu = pick(counts, chip=GPU)
    every = [*gpu_attention(gpu)] if GPU in chips else []
    for chip in tpus:
        every += tpu_attention(chip, pick(counts, chip=chip))
    every += zigzag(pick(counts, op="zigzag"))
    for chip in tpus:
        chosen = pick(counts, chip=chip)
        every += [*tpu_decode(chip, chosen), *tpu_matmul(chip, chosen)]
    every += gpu_matmul(gpu) if GPU in chips else ()
    return [*every, *compile_time(counts, chips)]


def pick(counts, **fields):
    return [row for row in counts if all(row.get(k) == v for k, v in fields.items())]


def missing(counts) -> str:
    """Say why there is nothing to count."""
    return "; ".join(row["error"] for row in counts if "error" in row) or "not there"


def gpu_attention(counts):
    for head_dim, bar in INSTRUCTIONS.items():
        chosen = pick(counts, op="flash_forward", head_dim=head_dim)
        what = f"SM120 flash forward, D={head_dim}, causal, positions and segments"
        against = "ptxas and nvdisasm: instructions a matrix instruction, no spill, 101,376 B"
        good = [row for row in chosen if row.get("kernels")]
        if not good:
            yield Row(
                what=what, value=None, unit="", against=against, bar=bar, detail=missing(chosen)
            )
            continue
        (kernel,) = good[0]["kernels"]
        loops = [f"{x['instructions']}/{x['matrix']}" for x in kernel["loops"]]
        yield Row(
            what=what,
            value=kernel["loops"][0]["instructions"] / kernel["loops"][0]["matrix"],
            unit="instructions a matrix instruction",
            against=against,
            bar=bar,
            detail=f"{machine(kernel)}; loops {', '.join(loops)}",
            also=kernel["spilled_bytes"] == 0,
        )
    for head_dim in INSTRUCTIONS:
        chosen = pick(counts, op="flash_backward", head_dim=head_dim)
        yield no_spill(f"SM120 flash backward, D={head_dim}, same", chosen, 2)


def machine(kernel):
    return f"{kernel['registers']} registers, {kernel['spilled_bytes']} B spilled"


def no_spill(what, chosen, kernels, names=()):
    """A row that asks for no spilled byte, and for PTX with all of `names` in it."""
    against = "ptxas: spilled bytes" + (f"; PTX: {', '.join(names)}" if names else "")
    good = [row for row in chosen if row.get("kernels")]
    if not good:
        return Row(what=what, value=None, unit="B", against=against, bar=0, detail=missing(chosen))
    every = [kernel for row in good for kernel in row["kernels"]]
    said = " ".join(name for kernel in every for name in kernel["matrix_names"])
    return Row(
        what=what,
        value=max(kernel["spilled_bytes"] for kernel in every),
        unit="B spilled",
        against=against,
        bar=0,
        detail="; ".join(f"{kernel['name']}: {machine(kernel)}" for kernel in every),
        also=len(every) >= kernels and len(good) == len(chosen) and all(n in said for n in names),
    )


def tpu_attention(chip, counts):
    for head_dim in INSTRUCTIONS:
        for what, bar in (("forward", 0.90), ("backward", 1.0)):
            chosen = pick(counts, op=f"flash_{what}", head_dim=head_dim)
            ours = [r for r in pick(chosen, whose="ours") if "unmasked" in r]
            theirs = [r for r in pick(chosen, whose="tokamax") if "unmasked" in r]
            best = min(theirs, key=lambda r: r["unmasked"], default=None)
            against = "tokamax splash, unmasked tile: " + (
                f"{best['unmasked']:,.0f} cycles at {best['blocks']}" if best else "not there"
            )
            for tile in ("unmasked", "masked") if what == "forward" else ("unmasked",):
                value = ours[0][tile] / best["unmasked"] if ours and best else None
                yield Row(
                    what=f"{chip} flash {what}, D={head_dim}, {tile} 1024x1024 tile",
                    value=value,
                    unit="of theirs",
                    against=against,
                    bar=bar if tile == "unmasked" else 1.0,
                    detail=held_back(ours[0], tile)
                    if ours
                    else missing(pick(chosen, whose="ours")),
                )


def held_back(row, tile):
    """Our bundles, and the greatest floors of single units."""
    (kernel,) = row["kernels"].values()
    most = max(hot["matmuls"] for hot in kernel["hot"])
    whole = [hot for hot in kernel["hot"] if hot["matmuls"] > 0.9 * most]
    parts = [hot for hot in kernel["hot"] if hot["matmuls"] <= 0.9 * most]  # of the diagonal
    hot = whole[0] if tile == "unmasked" else [*parts, *whole[1:]][0]
    top = sorted(hot["floors"].items(), key=lambda pair: -pair[1])[:4]
    floors = ", ".join(f"{unit} {n * row['share']:,.0f}" for unit, n in top)
    bundles = hot["bundles"] * row["share"]
    said = f"ours {row[tile]:,.0f} cycles, {bundles:,.0f} bundles; floors {floors}"
    if not parts or len(whole) != 4:
        return said
    # as the code stands: heads whose scores are bounded, then those that need a running maximum
    whole.sort(key=lambda hot: hot["first"])
    _, other, online, online_other = (f"{x['bundles'] * row['share']:,.0f}" for x in whole)
    if tile == "unmasked":
        return f"{said}; heads with a running maximum {online} bundles"
    return (
        f"the diagonal's triangle: {said}; a tile under any other mask {other} bundles, with a "
        f"running maximum {online_other}"
    )


def zigzag(counts):
    for row in counts:
        blocks = f"{row['block_q']}x{row['block_kv']}"
        yield Row(
            what=f"causal zigzag ring of 8, blocks of {blocks} ({row['chip']})",
            value=row["wrong"],
            unit="wrong blocks",
            against=f"{row['needed']:,} blocks hold a visible pair, {row['partial']:,} partly",
            bar=0,
            detail=f"visits {row['visited']:,}, masks {row['masked']:,}",
        )


def tpu_decode(chip, counts):
    for dtype in ("bfloat16", "int8"):
        chosen = pick(counts, op="decode_attention", dtype=dtype)
        good = [row for row in chosen if "cycles" in row]
        need = hbm_cycles(chip, good[0]["block_bytes"]) if good else math.nan
        yield Row(
            what=f"{chip} decode, 8:1 heads, D=128, {dtype} cache",
            value=good[0]["cycles"] / need if good else None,
            unit="of HBM's cycles",
            against=f"{need:,.0f} cycles for a block's {good[0]['block_bytes']:,} B"
            if good
            else "cycles that HBM needs for a block",
            bar=1.0,
            detail=f"{good[0]['cycles']:,} bundles, all that a step may run"
            if good
            else missing(chosen),
        )


def tpu_matmul(chip, counts):
    from benchmarks.deviceless.moe_decode import EMBED, TOKENS_PER_EXPERT, WIDTH

    floor = hbm_cycles(chip, EMBED * WIDTH * 2)
    for tokens in TOKENS_PER_EXPERT:
        chosen = pick(counts, op="grouped_matmul", tokens=tokens)
        ours = [r for r in pick(chosen, whose="ours") if "cycles" in r]
        theirs = [r for r in pick(chosen, whose="tokamax") if "cycles" in r]
        said = f"{theirs[0]['cycles']:,.0f}" if theirs else missing(pick(chosen, whose="tokamax"))
        limit = max(floor, theirs[0]["cycles"]) if theirs else floor
        yield Row(
            what=f"{chip} grouped matmul, 192 experts, 4096x1536, {tokens} tokens an expert",
            value=ours[0]["cycles"] / limit if ours and theirs else None,
            unit="of the larger",
            against=f"cycles an expert: tokamax ragged_dot {said}, HBM {floor:,.0f}",
            bar=1.0,
            detail=f"ours {ours[0]['cycles']:,.0f}"
            if ours
            else missing(pick(chosen, whose="ours")),
        )


def gpu_matmul(found):
    mine = pick(found, op="grouped_matmul", dtype="bfloat16")
    yield no_spill("SM120 grouped matmul, bfloat16", mine, 1, ("mma.sync", "m16n8k16"))


def compile_time(counts, chips):
    for chip in chips:
        timed = [r for r in counts if r["chip"] == chip and "compile_seconds" in r]
        slow = max(timed, key=lambda r: r["compile_seconds"]["cpu"], default=None)
        detail = ""
        if slow:
            keys = ("op", "head_dim", "dtype", "tokens")
            about = " ".join(str(slow[key]) for key in keys if key in slow)
            detail = f"{about}; {slow['compile_seconds']['clock']:.1f} s on the clock of this run"
        yield Row(
            what=f"slowest compilation for {CHIPS[chip].name}",
            value=slow["compile_seconds"]["cpu"] if slow else None,
            unit="CPU seconds, all threads",
            against="the whole program, no dumps: trace, lower, XLA, kernels",
            bar=COMPILE_SECONDS,
            detail=detail,
        )
