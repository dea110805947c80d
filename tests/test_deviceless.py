# SPDX-License-Identifier: Apache-2.0
"""What `make bench-deviceless` reads: made-up machine code, and bars with nothing beside them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """\
= control target key start
     0   :  { %s1 = operand /* input window allocation for operator input 1. The window shape is \
bf16[1,256,128], while the full shape is bf16[1,512,128]. */ }
   0x1   :  { %s2 = smov 0 }  /* Start region 1 */
   0x2 LB: > { %v3 = vmatmul }  /* Start region 2 */
   0x3   : > { %v4 = vmatmul }  /* End region 2 */
   0x4 PF: > { %v5 = vadd }  /* Start/End empty region 7 :: Start region 3 */
   0x5   : > > { %v6 = vmatmul } /* Start region 4 */
   0x6   : > > { %v7 = vmatmul } /* End region 4 */
   0x7   : > { %v8 = vst }  /* End region 3 */
   0x8   :  { %v9 = vst }  /* End region 1 */
"""
MATMULS = (0, 0, 2, 1, 0, 2, 2, 0, 0)
TABLE = "== CAPACITY:\nMATMUL, MATPUSH, VALU\n 2 2 4\n== UTILIZATION:\n" + "".join(
    f"{n} 0 1\n" for n in MATMULS
)
SASS = """\
.L_x_1:
        /*0000*/   MOV R1, R2 ;
.L_x_2:
        /*0010*/   LDSM.16.M88.4 R4, [R8] ;
        /*0020*/   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/   @!P0 FADD R1, R2, R3 ;
        /*0040*/   @P1 BRA `(.L_x_2) ;
        /*0050*/   @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/   IADD3 R1, R2, R3, RZ ;
        /*0070*/   @P3 BRA `(.L_x_3) ;
"""


@pytest.fixture(autouse=True)
def repository_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def write(folder, program=PROGRAM, table=TABLE):
    (folder / "17-flash_attention_forward.1-03-final_bundles.txt").write_text(program)
    name = "17-flash_attention_forward.1-01-final_hlo-static-per-bundle-utilization.txt"
    (folder / name).write_text(table)


def test_bundles_of_a_kernel(tmp_path):
    from jaxcp.compile import tpu_code

    write(tmp_path)
    kernel = tpu_code.kernels(tmp_path)["flash_attention_forward"]
    assert [(h.bundles, h.loops) for h in kernel.hot] == [(2, 1), (2, 2)]
    assert [h.floors for h in kernel.hot] == [{"MATMUL": 2, "VALU": 1}, {"MATMUL": 2, "VALU": 1}]
    assert [h.matmuls for h in kernel.hot] == [2, 2]
    assert kernel.around == 2, "0x4 and 0x7"
    assert kernel.windows == [("bf16", (1, 256, 128), 256 * 128 * 2)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0x3 ", "0x4 "),
        ("== UTILIZATION", "== SLOTS"),
        ("2 0 1\n2 0 1\n", ""),
        ("MATMUL, MATPUSH", "TENSOR, TENSORPUSH"),
    ],
)
def test_another_format_is_an_error(tmp_path, old, new):
    from jaxcp.compile import tpu_code

    write(tmp_path, PROGRAM.replace(old, new), TABLE.replace(old, new))
    with pytest.raises(ValueError, match="format changed"):
        tpu_code.kernels(tmp_path)


def test_innermost_loops_of_a_gpu_kernel():
    from jaxcp.compile import gpu_code

    (loop,) = gpu_code.matrix_loops(SASS)
    assert loop.opcodes == {"LDSM": 1, "HMMA": 1, "FADD": 1, "BRA": 1}
    assert loop.per_matrix == 4
    assert gpu_code.matrix_names("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}") == [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    ]


def test_what_is_not_there_is_not_reached():
    from benchmarks.deviceless import bars

    rows = bars.rows([])
    assert len(rows) > 50 and not any(row.reached for row in rows)
    assert len({row.what for row in rows}) == len(rows)


def test_a_bar_is_a_number_and_what_else_it_asks():
    from benchmarks.deviceless import bars

    kernel = {"name": "k", "registers": 200, "spilled_bytes": 0, "matrix_names": ["mma.m16n8k16"]}
    kernel["loops"] = [{"instructions": 380, "matrix": 100}]
    found = {
        "chip": "rtx-pro-6000",
        "op": "flash_forward",
        "head_dim": 128,
        "kernels": {"k": kernel},
    }
    (row,) = [row for row in bars.rows([found]) if "forward, D=128, causal" in row.what]
    assert row.reached and row.value == 3.8
    kernel["spilled_bytes"] = 4
    (row,) = [row for row in bars.rows([found]) if "forward, D=128, causal" in row.what]
    assert not row.reached
