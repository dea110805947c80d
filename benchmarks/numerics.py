# SPDX-License-Identifier: Apache-2.0
"""Errors of every operation on every backend, beside those of the reference in the same dtype.

    python -m benchmarks.numerics --out benchmarks/results     # about 3 minutes on a CPU
    python -m benchmarks.numerics --ops decode_attention       # one operation

Forward and each gradient against float64, on random inputs and on outlier-heavy ones. Kernels run
interpreted: that is their arithmetic, not their machine code. Exits with 1 where an error is more
than 1.5 times the reference's own, or two runs differ by a bit.
"""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
import tyro

from benchmarks.gpu.check import relative
from benchmarks.tables import table, versions, write
from pallas_kernels.grouped_matmul.quantized import FORMATS
from pallas_kernels.testing import decode_attention, flash_attention, grouped_matmul

IMPLEMENTATIONS = ("reference", "xla", "triton", "mosaic_tpu")
BAR = 1.5
# Where the reference is all but exact: float32 sums in another order and with another exp.
NOISE = 8 * float(np.finfo(np.float32).eps)
CACHES = (None, "int8", "float8_e4m3fn")

_flash = flash_attention.Case(queries=256, keys=256, heads=4, kv_heads=2, head_dim=64, sinks=True)
_decode = decode_attention.Case(
    batch=2, queries=4, slots=512, heads=16, kv_heads=2, dtype="bfloat16"
)
_grouped = grouped_matmul.Case(sizes=(0, 70, 3, 64, 29, 0), rows=170, summed=256, columns=256)


def _with(case, **more):
    return dataclasses.replace(case, **more)


# operation: suite, what a row is called, case
CASES = {
    "flash_attention": (
        flash_attention,
        {name: _with(_flash, dtype=name) for name in ("float32", "bfloat16", "float16")}
        | {"bfloat16, soft cap": _with(_flash, dtype="bfloat16", soft_cap=8.0)},
    ),
    "decode_attention": (
        decode_attention,
        {"float32": _with(_decode, dtype="float32"), "bfloat16": _decode}
        | {f"bfloat16, cache {cache}": _with(_decode, cache=cache) for cache in CACHES[1:]},
    ),
    "grouped_matmul": (
        grouped_matmul,
        {name: _with(_grouped, dtype=name) for name in ("float32", "bfloat16")}
        | {
            f"bfloat16, weights {weights}{' by block' * block}": _with(
                _grouped, dtype="bfloat16", weights=weights, block=block
            )
            for weights in CACHES[1:]
            for block in (False, True)
        },
    ),
    "grouped_swiglu": (
        grouped_matmul,
        {name: _with(_grouped, dtype=name, swiglu=True) for name in ("float32", "bfloat16")},
    ),
}


def rows(op: str, kinds=None, implementations=IMPLEMENTATIONS):
    """A row for every result of every backend; `kinds` names some of the cases."""
    suite, cases = CASES[op]
    for kind in cases if kinds is None else kinds:
        inputs = {name: _with(cases[kind], outliers=name == "outliers") for name in INPUTS}
        reference: dict = {}
        for implementation in implementations:
            try:
                runs = results(suite, implementation, inputs)
            except NotImplementedError as error:
                yield {"op": op, "kind": kind, "backend": implementation, "not": str(error)}
                continue
            except Exception as error:  # a backend that breaks is a row, and the others go on
                said = f"{type(error).__name__}: {str(error)[:200]}"
                yield {"op": op, "kind": kind, "backend": implementation, "failed": said}
                continue
            reference = reference or runs
            for name, case in inputs.items():
                for result, exact in suite.expected(case).items():
                    got, again = (run[result] for run in runs[name])
                    yield {
                        "op": op, "kind": kind, "backend": implementation, "inputs": name,
                        "result": result, "error": relative(got, exact),
                        "reference_error": relative(reference[name][0][result], exact),
                        "same_bits": got.tobytes() == again.tobytes(),
                    }  # fmt: skip


INPUTS = ("random", "outliers")


def results(suite, implementation, inputs) -> dict:
    """Two runs for each of the inputs, which differ in numbers only: compiled once."""
    fn, _ = suite.program(implementation, next(iter(inputs.values())))
    step = jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})
    runs = {}
    for name, case in inputs.items():
        _, given = suite.program(implementation, case)
        runs[name] = [{k: np.asarray(x) for k, x in step(given).items()} for _ in range(2)]
    return runs


def rounding():
    """Measure the cost of narrow values: the error against inputs that were not rounded to them."""
    cases = {f"cache {x}": (decode_attention, _with(_decode, cache=x)) for x in CACHES[1:]}
    for weights in CACHES[1:]:
        for block in (False, True):
            what = f"weights {weights}, a scale for {'128 x 128' if block else 'a channel'}"
            cases[what] = grouped_matmul, _with(_grouped, weights=weights, block=block)
    for format, rows in FORMATS.items():
        what = f"weights {format}, a scale for {rows} rows"
        cases[what] = grouped_matmul, _with(_grouped, weights=format)
    for what, (suite, case) in cases.items():
        errors = []
        for outliers in (False, True):
            case = _with(case, dtype="float32", outliers=outliers)
            wide = {"cache": None} if suite is decode_attention else {"weights": None}
            exact = suite.expected(_with(case, **wide))["out"]
            errors.append(relative(suite.expected(case)["out"], exact))
        yield [what, *errors]


def broken(row) -> str | None:
    """Say what is wrong with a row, or None."""
    if "not" in row:
        return None
    where = " ".join(row.get(name, "") for name in ("op", "kind", "backend", "inputs", "result"))
    if "failed" in row:
        return f"{where}: {row['failed']}"
    if not row["same_bits"]:
        return f"{where}: two runs differ"
    if not row["error"] <= BAR * row["reference_error"] + NOISE:
        return f"{where}: {row['error']:.2e}, the reference's {row['reference_error']:.2e}"
    return None


def markdown(rows: list[dict], narrow: list[list]) -> str:
    head = ["operation", "dtype", "backend", "inputs", "result", "error", "reference", "ratio"]
    lines = []
    for row in rows:
        line = [row["op"], row["kind"], row["backend"]]
        if "error" not in row:
            lines.append([*line, "", "not supported" if "not" in row else "FAILED"])
            continue
        ratio = row["error"] / row["reference_error"] if row["reference_error"] else float("nan")
        line += [row["inputs"], row["result"], f"{row['error']:.2e}"]
        line += [f"{row['reference_error']:.2e}", f"{ratio:.2f}"]
        lines.append([*line, "yes" if row["same_bits"] else "NO"])
    costs = [[what, *(f"{error:.2e}" for error in errors)] for what, *errors in narrow]
    missed = [line for row in rows if (line := broken(row))]
    parts = [
        "# Numerics",
        f"`python -m benchmarks.numerics`, {versions('jax', 'jaxlib')}.",
        f"Relative error in the 2-norm against float64. Bar: {BAR} of the reference's own in the "
        f"same dtype, and {NOISE:.0e} for the order of float32 sums. Every entry of `same bits` is "
        "two runs. Outliers: attention has one channel of keys and values times 30, matrices 1 "
        "entry in 500. Kernels are interpreted on a CPU.",
        table([*head, "same bits"], lines),
        "What narrow values cost: error against inputs that were not rounded to them.",
        table(("values", *INPUTS), costs),
        "Missed: " + ("; ".join(missed) or "nothing."),
    ]
    return "\n\n".join(parts)


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for numerics.md; None prints alone."""
    ops: tuple[str, ...] = tuple(CASES)


def main(args: Args) -> int:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    every = [row for op in args.ops for row in rows(op)]
    write(args.out, "numerics.md", markdown(every, list(rounding())))
    return int(any(broken(row) for row in every))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
