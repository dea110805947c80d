# SPDX-License-Identifier: Apache-2.0
"""Block sizes are searched with no device, and the answer is a row of the op's table."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcp.compile import gpu_code, machine_code
from jaxcp.tune import (
    PARTS,
    TARGETS,
    Problem,
    Result,
    Row,
    Tried,
    evaluate,
    gpu_cost,
    parts,
    search,
    tpu_cost,
)
from jaxcp.tune.inputs import fill
from jaxcp.tune.rows import table_lines
from pallas_kernels.dispatch import trying
from pallas_kernels.flash_attention import flash_attention, tuning


def needs_tools():
    for tool in gpu_code.TOOLS:
        try:
            gpu_code.find_tool(tool)
        except FileNotFoundError as error:
            pytest.skip(str(error))


def without_clock(found):
    said = found.as_json()
    del said["seconds"]
    return said


SMALL = {"tokens": 1024, "head_dim": 64}
LISTS = {
    "sm_120": dict(q=(32,), kv=(32,), warps=(4,), stages=(2,)),
    "v6e": dict(q=(512,), kv=(1024,), sub=(512,), strip=(256,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", LISTS)
def test_two_searches_without_a_device_give_one_row(target):
    if target == "sm_120":
        needs_tools()
    steps = []
    options = dict(shape=SMALL, values=LISTS[target])
    first = search("flash_attention", target, **options, progress=lambda *x: steps.append(x[:2]))
    assert first.by == "code" and first.complete and not first.not_tried
    assert len(first.tried) == len(steps) - 1 >= 2 and steps[-1][0] == steps[-1][1]
    assert first.ranked[0].cost == min(x.cost for x in first.tried if x.cost is not None)
    second = search("flash_attention", target, **options)
    assert without_clock(first) == without_clock(second)
    assert json.loads(json.dumps(first.as_json()))["row"] == second.row.text


@pytest.mark.slow
def test_what_spills_or_does_not_fit_is_refused():
    needs_tools()
    values = dict(q=(128,), kv=(128, 256), warps=(4,), stages=(3,))
    found = search("flash_attention", "sm_120", values=values, shape={"tokens": 1024})
    shipped, spills, large = found.tried
    assert spills.refused.startswith("spills ") and spills.cost is None
    assert "hared memory" in large.refused and large.cost is None
    assert found.best is shipped


def test_a_limit_that_cuts_the_search_is_said(monkeypatch):
    class Slow:
        by, unit, versions = "code", "cycles", {}
        shipped = tuning.Blocks(q=1024, kv=2048, strip=256)

        def __init__(self, problem, deadline):
            self.answers = 0

        def __call__(self, blocks, deadline):
            self.answers += 1
            if self.answers > 2:
                raise evaluate.OutOfTime
            return {"cost": 10.0 - self.answers}

        def close(self):
            pass

    monkeypatch.setattr(evaluate, "Coded", Slow)
    found = search("flash_attention", "v6e")
    assert len(found.tried) == 2 and not found.complete and found.best is found.tried[1]
    assert not found.as_json()["complete"] and len(found.as_json()["not_tried"]) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(op="conv"), "op must be one of flash_attention"),
        (dict(target="v4"), "target must be one of sm_120"),
        (dict(part="triton_dq"), "has the parts mosaic_forward, mosaic_backward; got 'triton_dq'"),
        (dict(shape={"width": 5}), "has the sizes tokens, heads"),
        (dict(shape={"tokens": 0}), "1 or more; got tokens=0"),
        (dict(dtype="int8"), "dtype must be bfloat16"),
        (dict(max_seconds=0), "max_seconds must be positive"),
        (dict(max_seconds=0.01), "not ready within max_seconds=0.01"),
        (dict(values={"warps": (4,)}), "searches q, kv, sub, strip; got warps"),
        (dict(shape={"head_dim": 1024}), "no block sizes for .TPU v6 lite., head_dim=1024"),
    ],
)
def test_what_makes_no_sense_is_an_error(options, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        search(**dict(op="flash_attention", target="v6e") | options)


def test_missing_tools_are_named(monkeypatch):
    def absent(name):
        raise FileNotFoundError("needs ptxas, which is not installed: pip install jaxcp[tune]")

    monkeypatch.setattr(gpu_code, "find_tool", absent)
    with pytest.raises(FileNotFoundError, match=r"jaxcp\[tune\]"):
        machine_code.Compiler("rtx-pro-6000")


def row(kind, head_dim=128, op="flash_attention", target="v6e", part="mosaic_forward", **sizes):
    about = parts.part_of(op, target, part)
    shape = about.sized({about.size: head_dim})
    problem = Problem(op=op, target=target, part=part, shape=shape, dtype="bfloat16")
    return Row(problem=problem, kind=kind, blocks=about.tuning.Blocks(**sizes))


def table(path):
    return [line.cells[:4] for line in table_lines(path.read_text())]


def test_a_row_goes_in_front_of_what_would_shadow_it(tmp_path):
    path = tmp_path / "tuning.py"
    shutil.copy(tuning.__file__, path)
    before = table(path)
    new = row("TPU v6", 64, q=512, kv=1024)
    assert new.write(path) and not new.write(path)
    after = table(path)
    key = ("mosaic_forward", "TPU v6", 64, 2)
    at = after.index(key)
    assert after[:at] + after[at + 1 :] == before
    assert all(
        not (n == key[0] and "TPU v6".startswith(k) and m >= 64) for n, k, m, _ in after[:at]
    )
    other = row("TPU v6", 64, q=512, kv=512)
    assert other.write(path) and table(path) == after, "the same key is replaced"
    assert other.text in path.read_text() and new.text not in path.read_text()
    done = subprocess.run([sys.executable, "-m", "ruff", "--version"], capture_output=True)
    if done.returncode == 0:
        command = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "100", path]
        assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_row_of_grouped_matmul_takes_the_limit_of_the_one_below(tmp_path):
    few = row(
        "TPU v5 lite", 8, "grouped_matmul", "v5e", "mosaic_matmul", m=128, n=1536, k=4096, rows=16
    )
    assert few.text.startswith('    ("mosaic_matmul", "TPU v5 lite", 32, 2, Blocks(m=128,')
    many = dataclasses.replace(few, problem=row(
        "", 512, "grouped_matmul", "v5e", "mosaic_matmul", m=1, n=1, k=1).problem)  # fmt: skip
    assert '"TPU v5 lite", MANY, 2' in " ".join(many.text.split())


def test_what_cannot_be_written_says_so(tmp_path, monkeypatch):
    path = tmp_path / "tuning.py"
    shutil.copy(tuning.__file__, path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "write_text", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied.*pip install -e"):
        row("TPU v6", 64, q=512, kv=1024).write(path)


def test_a_row_under_trial_is_part_of_the_jit_cache():
    q = jax.ShapeDtypeStruct((1, 256, 2, 32), jnp.float32)
    counted = []

    @jax.jit
    def attend(q):
        counted.append(tuning.blocks("triton_forward", 32, q.dtype, interpret=True).q)
        return flash_attention(q, q, q, implementation="triton")[0]

    x = jnp.asarray(np.random.default_rng(0).standard_normal(q.shape, np.float32))
    plain = attend(x)
    for size in (32, 128, 32):
        with trying("triton_forward", tuning.Blocks(q=size, kv=32)):
            np.testing.assert_allclose(attend(x), plain, atol=1e-5)
    assert counted == [64, 32, 128]
    assert tuning.blocks("triton_forward", 32, q.dtype, interpret=True).q == 64


def test_a_device_that_is_here_is_timed():
    problem = Problem(
        op="decode_attention", target="sm_120", part="triton", dtype="bfloat16",
        shape=dict(slots=64, heads=4, kv_heads=2, head_dim=32),
    )  # fmt: skip
    from pallas_kernels.decode_attention.tuning import Blocks

    timed = object.__new__(evaluate.Timed)  # the table has no row for a CPU
    timed.part, timed.problem = problem.about, problem
    timed.fn, args = problem.about.problem(problem.shape, jnp.bfloat16)
    timed.args = fill(timed.fn, args)
    assert int(timed.args[3][0, 0]) == 63 and timed.args[0].std() > 0.5
    answer = timed(Blocks(rows=16, splits=1), float("inf"))
    assert answer["cost"] > 0 and "20 runs" in answer["detail"]
    assert "refused" in timed(Blocks(rows=0), float("inf"))
    with pytest.raises(evaluate.OutOfTime):
        timed(Blocks(rows=16), 0.0)


def test_every_part_names_fields_and_rows_that_its_table_has():
    for part in PARTS:
        fields = {field.name for field in dataclasses.fields(part.tuning.Blocks)}
        assert part.values.keys() <= fields and part.size in part.shape
        assert any(line[0] == part.name for line in part.tuning.TABLE)
    named = {line[0] for part in PARTS for line in part.tuning.TABLE}
    assert named == {part.name for part in PARTS}, "every part of every table can be tuned"


def test_causal_tiles_are_those_of_the_plan():
    for tokens, q, kv in ((256, 32, 64), (256, 64, 32), (320, 64, 64)):
        seen = np.tril(np.ones((tokens, tokens), bool))
        tiles = [
            seen[i : i + q, j : j + kv] for i in range(0, tokens, q) for j in range(0, tokens, kv)
        ]
        whole = sum(bool(tile.all()) for tile in tiles)
        some = sum(bool(tile.any()) for tile in tiles)
        assert parts.causal_tiles(tokens, q, kv) == (whole, some - whole), (tokens, q, kv)


@pytest.mark.parametrize(("cost", "chosen"), [(100.0, 0), (99.0, 0), (97.0, 1), (101.0, 0)])
def test_the_row_that_ships_stays_unless_another_is_clearly_better(cost, chosen):
    tried = Tried(blocks="a", cost=100.0), Tried(blocks="b", cost=cost), Tried(blocks="c")
    result = Result(
        problem=row("TPU v6", q=1, kv=1).problem, by="code", unit="", device="v6e", versions={},
        tried=tried, not_tried=(), seconds=0.0,
    )  # fmt: skip
    assert result.best is tried[chosen] and len(result.ranked) == 2


def test_a_loop_that_does_too_little_is_an_error():
    loop = gpu_code.Loop({"HMMA": 128, "FADD": 372})
    kernel = gpu_code.Kernel("k", "sm_120", 200, 0, 0, ("mma.sync.m16n8k16.f32",), (loop,))
    flops = 128 * 8 * 2 * 16 * 8 * 16  # of 8 warps
    assert gpu_cost.tile_slots(kernel, 8, flops, 0) == (4000, 4000)
    assert gpu_cost.tile_slots(kernel, 8, flops / 2, 0) == (4000, 4000), "warps may repeat work"
    assert gpu_cost.tile_slots(kernel, 8, flops, 1 << 17) == (8192, 8192), "128 KiB from L2"
    with pytest.raises(ValueError, match=r"does 0\.50 of a tile"):
        gpu_cost.tile_slots(kernel, 4, flops, 0)
    assert "spills 8 B" == gpu_cost.refused(dataclasses.replace(kernel, spilled_bytes=8))


def test_a_region_takes_at_least_its_peak_and_holds_its_work():
    from jaxcp.compile.tpu_code import Hot
    from pallas_kernels.devices import CHIPS

    # what libtpu makes of 256 x 256 x 4096 on v5e: its bundles outrun the four matrix units
    hot = Hot(first=0, bundles=3336, loops=3, matmuls=1024, floors={})
    assert tpu_cost.cycles("v5e", hot, 2 * 256 * 256 * 4096) == 4096
    with pytest.raises(ValueError, match="runs more often than it is counted"):
        tpu_cost.cycles("v5e", hot, 2 * 512 * 256 * 4096)
    for name, clock in (("v5e", 1.5), ("v5p", 1.75), ("v6e", 1.75), ("tpu7x", 2.2)):
        flops = CHIPS[name].bf16_flops / tpu_cost.CORES[name]
        assert flops == pytest.approx(tpu_cost.PEAK[name] * clock * 1e9, rel=0.005)
    assert TARGETS.keys() >= tpu_cost.PEAK.keys()


RECORDED = pathlib.Path(__file__).parents[3] / "benchmarks/results/gpu_2026-11-27_h200_tune.jsonl"


def test_a_short_limit_leaves_the_worst_untried():
    """What an H200 timed as best comes early; in the order of the lists it came near the end."""
    for record in map(json.loads, RECORDED.read_text().splitlines()):
        about = parts.part_of(record["op"], "h200", record["part"])
        shipped = about.tuning.Blocks(**record["shipped"]["blocks"])
        trial = list(about.candidates(shipped, record["shape"]))
        assert trial[0] == shipped and len(set(trial)) == len(trial)
        steps = [about.doublings(shipped, blocks) for blocks in trial]
        assert steps == sorted(steps) and steps[0] == 0 < steps[1]
        if record["op"] == "grouped_matmul":
            costs = {about.tuning.Blocks(**x["blocks"]): x["cost"] for x in record["tried"]}
            early = [costs[blocks] for blocks in trial[: len(trial) // 4] if costs.get(blocks)]
            assert min(early) < 1.01 * min(cost for cost in costs.values() if cost)
