# SPDX-License-Identifier: Apache-2.0
"""The table of errors, a slice of it; and the Triton kernels in the blocks that sm_120 gets.

The suites run the interpreter with small blocks. Here the kernels are interpreted in the sizes
that they are compiled with, which have other paths: products in parts, one block for all.
"""

import pytest
from slow import slow_but

from benchmarks import numerics
from pallas_kernels.decode_attention import tuning as decode
from pallas_kernels.dispatch import INTERPRETED
from pallas_kernels.flash_attention import tuning as flash
from pallas_kernels.grouped_matmul import tuning as grouped
from pallas_kernels.testing import decode_attention, flash_attention, grouped_matmul
from pallas_kernels.testing.decode_attention import Case as Decode
from pallas_kernels.testing.flash_attention import Case as Attention
from pallas_kernels.testing.grouped_matmul import Case as Grouped

KIND = "bfloat16, cache int8"


@pytest.mark.slow
def test_a_slice_of_the_table():
    found = list(numerics.rows("decode_attention", (KIND,), ("reference", "xla", "triton")))
    assert len(found) == 3 * 2 * 2  # backends, inputs, results
    assert [line for row in found if (line := numerics.broken(row))] == []
    assert all(0 < row["error"] < 0.02 for row in found)
    rounding = list(numerics.rounding())
    assert len(rounding) == 10
    assert all(0 < error < 0.25 for _, *errors in rounding for error in errors)
    text = numerics.markdown(found, rounding)
    assert text.count(KIND) == len(found) and "nvfp4" in text


def test_what_breaks_the_bar_is_said():
    row = {"op": "o", "kind": "k", "backend": "b", "inputs": "i", "result": "r", "same_bits": True}
    assert numerics.broken(row | {"error": 1.4e-3, "reference_error": 1e-3}) is None
    assert "the reference's" in numerics.broken(row | {"error": 1.6e-3, "reference_error": 1e-3})
    assert "the reference's" in numerics.broken(row | {"error": float("nan"), "reference_error": 1})
    off = {"error": 0.0, "reference_error": 0.0, "same_bits": False}
    assert "two runs differ" in numerics.broken(row | off)
    assert numerics.broken({"op": "o", "kind": "k", "backend": "b", "not": "no float16"}) is None


SUITES = {Attention: flash_attention, Decode: decode_attention, Grouped: grouped_matmul}
CASES = [
    Attention(queries=300, keys=300, head_dim=64, dtype="bfloat16", sinks=True),
    Attention(queries=200, keys=200, head_dim=128, dtype="bfloat16", soft_cap=9.0),
    Attention(
        queries=200, keys=200, head_dim=128, heads=4, dtype="bfloat16", layout="zigzag",
        documents=2, window=90, carry=True,
    ),
    Attention(queries=140, keys=140, head_dim=256, dtype="bfloat16", carry=True),
    Attention(queries=140, keys=140, head_dim=192, value_dim=128, dtype="float16"),
    Attention(queries=140, keys=140, head_dim=128, window=50),
    Decode(slots=500, head_dim=128, dtype="bfloat16", queries=4),
    Decode(slots=500, head_dim=128, dtype="bfloat16", cache="int8", window=200),
    Grouped(sizes=(200, 0, 61), rows=270, dtype="bfloat16"),
    Grouped(sizes=(9, 0, 17), rows=30, dtype="bfloat16"),
    Grouped(sizes=(200, 0, 61), rows=270, dtype="bfloat16", swiglu=True),
    Grouped(dtype="bfloat16", weights="int8", block=True),
    Grouped(sizes=(90, 6), rows=96),
]  # fmt: skip


@pytest.mark.parametrize("case", slow_but(CASES, lambda case: case in CASES[::4]))
def test_the_blocks_of_sm_120(case, monkeypatch):
    for module in (flash, decode, grouped):
        kept = tuple(row for row in module.TABLE if row[1] != INTERPRETED)
        assert len(kept) < len(module.TABLE)
        monkeypatch.setattr(module, "TABLE", kept)
    for cached in (decode_attention.run, grouped_matmul.run):
        cached.cache_clear()  # what ran in other blocks is not what is asked for
    SUITES[type(case)].check("triton", case)
