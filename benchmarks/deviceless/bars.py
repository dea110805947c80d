# SPDX-License-Identifier: Apache-2.0
"""The bars, with the count beside each: one row a bar, chip and shape."""

import dataclasses
from collections.abc import Iterator

from benchmarks.deviceless.programs import EXPERTS, TOKENS_PER_EXPERT
from jaxcp.tune.tpu_cost import hbm_cycles
from pallas_kernels.devices import CHIPS

INSTRUCTIONS = {64: 5.2, 128: 3.9, 256: 5.6}  # of the hot loop, a matrix instruction
TPUS = ("v5e", "v5p", "v6e", "tpu7x")
GPU = "rtx-pro-6000"
COMPILE_SECONDS = 5.0
DECAYS = ((False, "head"), (True, "channel"))
# pass, which of our tiles, bar
TILES = (("forward", "unmasked", 0.9), ("forward", "masked", 1.0), ("backward", "unmasked", 1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    what: str
    against: str
    bar: float
    value: float | None = None  # None: there is nothing to count
    unit: str = ""
    detail: str = ""
    also: bool = True  # what the bar asks besides the number

    @property
    def reached(self) -> bool:
        return self.value is not None and self.value <= self.bar and self.also


def rows(counts: list[dict], chips: tuple[str, ...] = (*TPUS, GPU)) -> list[Row]:
    """Every bar of `chips`, with its count."""
    every: list[Row] = []
    for chip in chips:
        of_chip = pick(counts, chip=chip)
        if chip == GPU:
            every += gpu_kernels(of_chip)
        else:
            every += [*tpu_attention(chip, of_chip), *tpu_decode(chip, of_chip)]
            every += tpu_matmul(chip, of_chip)
            every += tpu_delta(chip, of_chip)
        every.append(compile_time(chip, of_chip))
    return every


def pick(counts: list[dict], **fields) -> list[dict]:
    return [row for row in counts if all(row.get(k) == v for k, v in fields.items())]


def counted(counts: list[dict], **fields) -> tuple[dict | None, str]:
    """The row with these fields, or None and why there is nothing to count."""
    chosen = pick(counts, **fields)
    good = [row for row in chosen if "error" not in row]
    if good:
        return good[0], ""
    return None, "; ".join(row["error"] for row in chosen) or "not there"


def gpu_kernels(counts: list[dict]) -> Iterator[Row]:
    for head_dim, bar in INSTRUCTIONS.items():
        row = Row(
            what=f"SM120 flash forward, D={head_dim}, causal, positions and segments",
            against="ptxas and nvdisasm: instructions a matrix instruction, no spill, 101,376 B",
            bar=bar,
            unit="instructions a matrix instruction",
        )
        good, detail = counted(counts, op="flash_forward", head_dim=head_dim)
        if good is None:
            yield dataclasses.replace(row, detail=detail)
            continue
        (kernel,) = good["kernels"].values()
        loops = [f"{x['instructions']}/{x['matrix']}" for x in kernel["loops"]]
        yield dataclasses.replace(
            row,
            value=kernel["loops"][0]["instructions"] / kernel["loops"][0]["matrix"],
            detail=f"{machine(kernel)}; loops {', '.join(loops)}",
            also=kernel["spilled_bytes"] == 0,
        )
    for head_dim in INSTRUCTIONS:
        what = f"SM120 flash backward, D={head_dim}, same"
        yield no_spill(what, pick(counts, op="flash_backward", head_dim=head_dim), kernels=2)
    what = "SM120 grouped matmul, bfloat16"
    names = ("mma.sync", "m16n8k16")
    yield no_spill(what, pick(counts, op="grouped_matmul"), kernels=1, names=names)
    for by_channel, kind in DECAYS:
        what = f"SM120 gated delta rule and its gradient, a decay a {kind}, bfloat16"
        yield no_spill(what, pick(counts, op="gated_delta", by_channel=by_channel), kernels=3)


def machine(kernel: dict) -> str:
    return f"{kernel['registers']} registers, {kernel['spilled_bytes']} B spilled"


def no_spill(what: str, chosen: list[dict], kernels: int, names: tuple[str, ...] = ()) -> Row:
    """A row that asks for no spilled byte, and for PTX with all of `names` in it."""
    against = "ptxas: spilled bytes" + (f"; PTX: {', '.join(names)}" if names else "")
    good, detail = counted(chosen)
    if good is None:
        return Row(what=what, against=against, bar=0, detail=detail)
    every = [kernel for row in chosen for kernel in row.get("kernels", {}).values()]
    said = " ".join(name for kernel in every for name in kernel["matrix_names"])
    whole = len(every) >= kernels and not any("error" in row for row in chosen)
    return Row(
        what=what,
        against=against,
        bar=0,
        value=max(kernel["spilled_bytes"] for kernel in every),
        unit="B spilled",
        detail="; ".join(f"{kernel['name']}: {machine(kernel)}" for kernel in every),
        also=whole and all(name in said for name in names),
    )


def tpu_attention(chip: str, counts: list[dict]) -> Iterator[Row]:
    for head_dim in INSTRUCTIONS:
        for what, tile, bar in TILES:
            chosen = pick(counts, op=f"flash_{what}", head_dim=head_dim)
            ours, why = counted(chosen, whose="ours")
            theirs = [r for r in pick(chosen, whose="tokamax") if "error" not in r]
            best = min(theirs, key=lambda r: r["unmasked"], default=None)
            said = f"{best['unmasked']:,.0f} cycles at {best['blocks']}" if best else "not there"
            yield Row(
                what=f"{chip} flash {what}, D={head_dim}, {tile} 1024x1024 tile",
                against=f"tokamax splash, unmasked tile: {said}",
                bar=bar,
                value=ours[tile] / best["unmasked"] if ours and best else None,
                unit="of theirs",
                detail=held_back(ours, tile) if ours else why,
            )


def held_back(row: dict, tile: str) -> str:
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


def tpu_decode(chip: str, counts: list[dict]) -> Iterator[Row]:
    for dtype in ("bfloat16", "int8"):
        good, why = counted(counts, op="decode_attention", dtype=dtype)
        row = Row(
            what=f"{chip} decode, 8:1 heads, D=128, {dtype} cache",
            against="cycles that HBM needs for a block",
            bar=1.0,
            unit="of HBM's cycles",
            detail=why,
        )
        if good is not None:
            need = hbm_cycles(chip, good["block_bytes"])
            row = dataclasses.replace(
                row,
                value=good["cycles"] / need,
                against=f"{need:,.0f} cycles for a block's {good['block_bytes']:,} B",
                detail=f"{good['cycles']:,} bundles, all that a step may run",
            )
        yield row


def tpu_matmul(chip: str, counts: list[dict]) -> Iterator[Row]:
    experts, embed, width = EXPERTS.values()
    floor = hbm_cycles(chip, embed * width * 2)
    for tokens in TOKENS_PER_EXPERT:
        chosen = pick(counts, op="grouped_matmul", tokens=tokens)
        ours, why = counted(chosen, whose="ours")
        theirs, said = counted(chosen, whose="tokamax")
        said = f"{theirs['cycles']:,.0f}" if theirs else said
        yield Row(
            what=f"{chip} grouped matmul, {experts} experts, {embed}x{width}, {tokens} tokens "
            "an expert",
            against=f"cycles an expert: tokamax ragged_dot {said}, HBM {floor:,.0f}",
            bar=1.0,
            value=ours["cycles"] / max(floor, theirs["cycles"]) if ours and theirs else None,
            unit="of the larger",
            detail=f"ours {ours['cycles']:,.0f}" if ours else why,
        )


def tpu_delta(chip: str, counts: list[dict]) -> Iterator[Row]:
    for by_channel, kind in DECAYS:
        good, why = counted(counts, op="gated_delta", by_channel=by_channel)
        yield Row(
            what=f"{chip} gated delta rule, a decay a {kind}, 64 tokens, forward and backward",
            against="bundles that the MXU alone would need for what needs no state",
            bar=4.0,
            value=good["bundles"] / good["mxu"] if good else None,
            unit="of the MXU's",
            detail="; ".join(f"{name} {n:,}" for name, (n, _) in good["hot"].items())
            if good
            else why,
        )


def compile_time(chip: str, counts: list[dict]) -> Row:
    timed = [row for row in pick(counts, whose="ours") if "cpu_seconds" in row]
    slow = max(timed, key=lambda row: row["cpu_seconds"], default={})
    keys = ("op", "head_dim", "dtype", "tokens")
    return Row(
        what=f"slowest compilation for {CHIPS[chip].name}",
        against="the whole program: trace, lower, XLA, kernels, and writing their machine code",
        bar=COMPILE_SECONDS,
        value=slow.get("cpu_seconds"),
        unit="CPU seconds, all threads",
        detail=" ".join(str(slow[key]) for key in keys if key in slow),
    )
