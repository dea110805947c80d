# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `make bench-cp`: links, blocks, schedules, and tables made of numbers alone."""

import json
import pathlib
import sys

import numpy as np
import pytest

from benchmarks.cp import cpu, glue, model, problem, skipping, tiles
from benchmarks.cp.links import HOP, Torus
from jaxcp.compile import tpu_code
from jaxcp.layout import Contiguous, Zigzag
from pallas_kernels.devices import V5P

ROOT = pathlib.Path(__file__).parents[1]
RATE = V5P.link_bytes_per_second


def circle(n, closed=True):
    return Torus(V5P, (n,), (closed,), tuple((i,) for i in range(n)))


def test_a_rotation_on_a_circle_and_on_a_line():
    assert circle(4).rotation(RATE) == pytest.approx(1 + HOP)
    assert circle(4).rotation(RATE, both_ways=True) == pytest.approx(0.5 + HOP)
    # the way back of a line takes the other direction of every link, which nobody else takes
    assert circle(4, closed=False).rotation(RATE) == pytest.approx(1 + 3 * HOP)
    assert circle(4, closed=False).rotation(RATE, both_ways=True) == pytest.approx(1 + 3 * HOP)
    assert circle(8).rotation(RATE, stride=2) == pytest.approx(2 + 2 * HOP)


def test_collectives_take_what_is_known_of_circles():
    for n in (4, 8):
        # all-to-all on a circle: n^2 / 8 messages on every link of either direction
        assert circle(n).exchange(RATE, n) == pytest.approx(n * n / 8 + n // 2 * HOP)
        assert circle(n).gather(RATE) == pytest.approx((n - 1) / 2 + n // 2 * HOP)
    square = Torus(V5P, (2, 2), (False, False), ((0, 0), (0, 1), (1, 0), (1, 1)))
    # each message to the corner opposite goes over one link of either axis
    assert square.exchange(RATE, 4) == pytest.approx(2 + 2 * HOP)
    assert square.ports == 2


@pytest.mark.parametrize("layout", [Zigzag(), Contiguous()])
@pytest.mark.parametrize("block_q, block_kv", [(4, 4), (2, 4), (8, 8)])
def test_blocks_are_those_that_the_positions_ask_for(layout, block_q, block_kv):
    shards, tokens = 4, 8
    order = layout.order(shards * tokens, shards).reshape(shards, tokens)
    for step in range(shards):
        keys = np.roll(order, step, axis=0)
        found = tiles.visits(order, keys, block_q, block_kv)
        seen = (keys[:, None] <= order[:, :, None]).reshape(
            shards, tokens // block_q, block_q, tokens // block_kv, block_kv
        )
        some, every = seen.any((2, 4)), seen.all((2, 4))
        triangle = np.tril(np.ones((block_q, block_kv), bool))
        lower = (seen.transpose(0, 1, 3, 2, 4) == triangle).all((3, 4)) & ~every
        if step or block_q != block_kv:  # equal positions meet at home
            lower[:] = False
        run = (np.diff(order.reshape(shards, -1, block_q)) == 1).all(2)  # not over two pieces
        lower &= run[:, :, None]
        expected = every, lower, some & ~every & ~lower, ~some
        assert np.array_equal(found, np.stack([x.sum((1, 2)) for x in expected], axis=1))


def test_a_triangle_is_a_block_against_itself():
    run = np.arange(4)[None]
    assert tiles.visits(run, run, 4, 4).tolist() == [[0, 1, 0, 0]]
    assert tiles.visits(run, run + 2, 4, 4).tolist() == [[0, 0, 1, 0]]


def steps(kernels, wire):
    kernels = np.array(kernels, float)  # [steps, ranks]
    parts = [np.stack([x, x, 0 * x]) for x in kernels]
    wires = [wire] * (len(parts) - 1) + [0.0]
    return [model.Step(x, 0.5, w) for x, w in zip(parts, wires, strict=True)]


def test_a_rank_waits_for_its_kernel_and_for_its_neighbour():
    balanced = model.play(model.Schedule(steps([[2, 2], [2, 2]], 1), alone=3))
    assert (balanced.total, balanced.works, balanced.glue, balanced.wire) == (8, 4, 1, 4)
    assert balanced.limit == "MXU"
    assert model.play(model.Schedule(steps([[2, 2], [2, 2]], 7))).limit == "wire"
    assert model.play(model.Schedule(steps([[2, 2], [2, 2]], 7))).total == 7 + 2.5
    # causal and contiguous: the last rank works in every step, and all end with it
    causal = model.play(model.Schedule(steps([[1, 1, 1], [0, 2, 2], [0, 0, 2]], 0.1)))
    assert (causal.total, causal.works) == (6.5, 5)
    # what the first rank needs in its last step leaves the slow one late
    assert model.play(model.Schedule(steps([[1, 5], [1, 1], [9, 1]], 2))).total == 5.5 + 2 + 9.5


HLO = """\
%body (p: (f32[8])) -> (f32[8]) {
  %p = (f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %norm = f32[2]{0:S(1)} fusion(%x), kind=kLoop, metadata={op_name="jit(f)/jvp()/while/norm"}, \
backend_config={"estimated_cycles":"70"}
  %kernel = f32[8]{0} custom-call(%x, %norm), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/jvp()/while/pallas_call"}
  %copy = f32[8]{0} copy(%kernel), backend_config={"estimated_cycles":"5"}
  ROOT %t = (f32[8]{0}) tuple(%copy)
}

ENTRY %main (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  %t = (f32[8]{0}) tuple(%q)
  %w = (f32[8]{0}) while(%t), condition=%condition, body=%body
  %y = f32[8]{0} get-tuple-element(%w), index=0
  ROOT %z = bf16[8]{0} convert(%y), metadata={op_name="jit(f)/transpose(jvp())/convert"}, \
backend_config={"estimated_cycles":"9"}
}
"""


def test_glue_is_counted_where_it_runs():
    found = glue.read(HLO)
    # the norm lies in VMEM: only what it reads counts; the copy reads and writes
    assert found["forward"]["turn"] == glue.Glue(2, 32 + 64, 75)
    assert found["backward"]["once"] == glue.Glue(1, 32 + 16, 9)
    assert found["forward"]["once"] == found["backward"]["turn"] == glue.Glue()


PROGRAM = """\
     0   :  { %s1 = smov 0 }
   0x1   : > { %1 = sbr.rel (%p1) target = $region9 }
   0x2   : > { %v2 = vadd }
   0x3   : > { %3 = sbr.rel (%p3) target = $region5 }
   0x4   : > { %v4 = vmatmul }
   0x5   : > { %v5 = vmatmul }
   0x6   : > { %v6 = vmatmul }
   0x7   : > { %v7 = vmatmul }
   0x8   : > { %v8 = vmatmul }
   0x9   : > { %v9 = vmatmul }
   0xa   : > { %va = vadd } /* Start/End empty region 5 */
   0xb   : > { %vb = vadd } /* Start/End empty region 9 */
   0xc   : > { %c = sbr.rel (%pc) target = $region1 }
   0xd   :  { %vd = vst }
"""


def test_a_skipped_step_goes_round_the_work_but_not_round_the_step():
    hot = [tpu_code.Hot(first=first, bundles=11, loops=1, matmuls=3, floors={}) for first in (4, 7)]
    kernel = tpu_code.Kernel(hot=hot, around=6, windows=[])
    # region 9 is where the pipeline goes without a step; one over all of the work is no `pl.when`
    with pytest.raises(ValueError, match="no way around"):
        skipping.bundles(PROGRAM, kernel)
    inner = PROGRAM.replace("$region9", "$region8").replace(
        "%v7 = vmatmul }", "%v7 } /* Start/End empty region 8 */"
    )
    assert skipping.bundles(inner, kernel) == 1 + skipping.DELAY + (0xC - 7)


def test_float64_is_what_autodiff_says():
    import jax

    arrays = problem.inputs(48)
    q, k, v = (arrays[x] for x in "qkv")

    def layer(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    out, pull = jax.vjp(layer, q, k, v)
    for name, x in zip(problem.NAMES, (out, *pull(arrays["dout"])), strict=True):
        np.testing.assert_allclose(problem.exact(arrays)[name], x, atol=2e-6, rtol=1e-5)


def test_what_is_wrong_does_not_win():
    def row(name, *numbers):
        about = {"name": name, "dtype": "float32", "note": ""}
        return about | dict(zip(cpu.COLUMNS, numbers, strict=True))

    rows = [row("a", 3.0, 9.0, 1e-6, 1e-6), row("b", 2.0, 1.0, 1e-6, 1.0)]
    rows += [row("c", 4.0, 8.0, 2e-6, 1e-6), row("d", 1.0, 1.0, float("nan"), 1.0)]
    assert list(cpu.winners(rows).values()) == [3.0, 8.0, 1e-6, 1e-6]
    rows.append({"name": "e", "error": "No module named 'e'"})
    text = cpu.markdown(64, 1, rows)
    assert "| **3.0** |" in text and "| **8.0** |" in text and "| 1.0 | 1.0 |" in text
    assert "wrong error of gradients" in text and "wrong error of out" in text
    assert "No module named 'e'" in text


def test_a_race_has_a_row_for_each_contender(monkeypatch):
    """Compare contenders whose tokens come out of order; one that fails says so."""
    from benchmarks.cp import contenders

    def some(tokens):
        first, second, *_ = contenders.ours(tokens)
        yield from (first, second)
        yield contenders.Contender("broken", None, np.arange(tokens))

    monkeypatch.setitem(contenders.GROUPS, "ours", some)
    ring, narrow, broken = cpu.race(64, 1, groups=("ours",))
    assert (ring["name"], narrow["dtype"], broken["name"]) == ("jaxcp Ring()", "bfloat16", "broken")
    for row in (ring, narrow):
        assert not cpu.wrong(row) and all(row[column] > 0 for column in cpu.COLUMNS)
    assert "TypeError" in broken["error"] and cpu.COLUMNS[0] not in broken


def test_a_package_that_is_not_there_is_a_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "ringattention", None)
    (row,) = cpu.race(64, 1, groups=("ringattention",))
    assert "ringattention" in row["error"]


def test_the_table_is_what_the_model_says_of_the_counts():
    from benchmarks.cp import deviceless

    report = json.loads((ROOT / "benchmarks/results/cp_deviceless.json").read_text())
    text = (ROOT / "benchmarks/results/cp_deviceless.md").read_text()
    assert text.endswith(deviceless.markdown(report) + "\n")
    case = ("v6e:2x4", 131_072)
    kept = [r for r in report["rows"] if (r["slice"], r["length"]) == case]
    found = deviceless.predict(report["found"], cases=(case,))
    assert [r["label"] for r in found] == [r["label"] for r in kept]
    assert [r.get("total") for r in found] == pytest.approx([r.get("total") for r in kept])
