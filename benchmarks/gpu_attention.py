# SPDX-License-Identifier: Apache-2.0
"""Triton flash attention on the GPU at hand: is it right, and how fast beside what others have.

    benchmarks/gpu.sh OUT_DIR                               # everything, written to OUT_DIR
    python benchmarks/gpu_attention.py --check-only         # correctness alone
    python benchmarks/gpu_attention.py --smoke              # tiny, interpreted, on CPU

Needs jax, jaxtyping, numpy and this repository on PYTHONPATH; no network. Exits with 1 where a
result is wrong.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import platform
import secrets
import statistics
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash_attention
from pallas_kernels.devices import find

# Relative error in the 2-norm. float32 products may be TF32 on a GPU.
TOLERANCE = {"bfloat16": 1e-2, "float32": 5e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    batch: int = 1
    tokens: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    dtype: str = "bfloat16"
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    packed: bool = False  # documents of different lengths
    ring: bool = False  # positions as shards have them: rows that see nothing, some, all

    def __str__(self):
        extra = [name for name in ("packed", "ring") if getattr(self, name)]
        extra += [] if self.causal else ["full"]
        extra += [f"{n} {x}" for n in ("window", "soft_cap") if (x := getattr(self, n)) is not None]
        shape = f"B{self.batch} T{self.tokens} N{self.heads}/{self.kv_heads} H{self.head_dim}"
        return " ".join([shape, self.dtype, *extra])

    def flops(self) -> float:
        """Of the forward pass, visible pairs only; with the backward pass it is 3.5 times that."""
        pairs = self.tokens**2
        if self.window is not None:
            pairs = self.window * self.tokens - self.window * (self.window - 1) / 2
        elif self.causal:
            pairs = self.tokens * (self.tokens + 1) / 2
        return 4.0 * self.batch * self.heads * self.head_dim * pairs


CHECKS = [
    Case(batch=2, tokens=1024),
    Case(batch=2, tokens=1000, head_dim=64, heads=8, kv_heads=1),
    Case(tokens=777, head_dim=96, heads=3, kv_heads=3),
    Case(tokens=1024, head_dim=256),
    Case(tokens=1024, causal=False),
    Case(tokens=2048, window=300),
    Case(tokens=1024, soft_cap=20.0),
    Case(batch=2, tokens=1500, packed=True, window=512),
    Case(tokens=2048, ring=True),
    Case(tokens=1000, dtype="float32"),
    Case(tokens=1000, dtype="float32", head_dim=256, ring=True),
]
TIMINGS = [
    Case(batch=8, tokens=1024, heads=16, kv_heads=16),
    Case(batch=4, tokens=4096, heads=32, kv_heads=32, head_dim=64),
    Case(batch=4, tokens=4096, heads=32, kv_heads=8),
    Case(batch=4, tokens=4096, heads=32, kv_heads=8, causal=False),
    Case(batch=1, tokens=16384, heads=32, kv_heads=8),
    Case(batch=1, tokens=16384, heads=16, kv_heads=4, head_dim=256),
    Case(batch=1, tokens=32768, heads=16, kv_heads=4, window=4096),
    Case(batch=1, tokens=65536, heads=16, kv_heads=4),
]
SMOKE_CHECKS = [
    Case(tokens=70, head_dim=32),
    Case(tokens=64, head_dim=32, dtype="float32", ring=True),
    Case(tokens=96, head_dim=32, packed=True, window=40, soft_cap=5.0),
]
SMOKE_TIMINGS = [Case(tokens=64, head_dim=32, window=16)]


def random_inputs(case: Case, seed: int):
    """q, k, v, positions and segments of both sides, cotangents of out and lse."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=case.dtype):
        return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)

    b, t, n, kv, h = case.batch, case.tokens, case.heads, case.kv_heads, case.head_dim
    q_pos = kv_pos = np.arange(t)
    if case.ring:  # of 8 chunks: chunk 1 sees nothing of 2 and 6; chunk 6 all of 2, some of 6
        chunk, half = np.arange(t // 2), t // 2
        q_pos = np.concatenate([chunk + half, chunk + 6 * half])
        kv_pos = np.concatenate([chunk + 2 * half, chunk + 6 * half])
    positions = [jnp.broadcast_to(jnp.asarray(p, jnp.int32), (b, t)) for p in (q_pos, kv_pos)]
    segments = [None, None]
    if case.packed:
        ends = np.sort(rng.integers(1, t, (b, 4)), axis=1)
        ids = (np.arange(t)[None, :, None] >= ends[:, None]).sum(-1)
        segments = [jnp.asarray(ids, jnp.int32)] * 2
    qkv = normal(b, t, n, h), normal(b, t, kv, h), normal(b, t, kv, h)
    return qkv, (*positions, *segments), (normal(b, t, n, h), normal(b, t, n, dtype="float32"))


def ours(case: Case, q, k, v, q_pos, kv_pos, q_seg, kv_seg):
    return flash_attention(
        q, k, v, q_positions=q_pos, kv_positions=kv_pos, q_segment_ids=q_seg, kv_segment_ids=kv_seg,
        causal=case.causal, window=case.window, soft_cap=case.soft_cap, implementation="triton",
    )  # fmt: skip


def dense(case: Case, q, k, v, q_pos, kv_pos, q_seg, kv_seg):
    """The definition, with every score in memory; written apart from the package it checks."""
    (b, t, n, h), kv_heads = q.shape, k.shape[2]
    scores = jnp.einsum("btkgh,bskh->bkgts", q.reshape(b, t, kv_heads, -1, h), k) * h**-0.5
    if case.soft_cap is not None:
        scores = case.soft_cap * jnp.tanh(scores / case.soft_cap)
    distance = q_pos[:, :, None] - kv_pos[:, None]
    visible = (distance >= 0) if case.causal else jnp.ones_like(distance, bool)
    if case.window is not None:
        visible &= distance < case.window
    if q_seg is not None:
        visible &= q_seg[:, :, None] == kv_seg[:, None]
    visible = visible[:, None, None]
    top = jax.lax.stop_gradient(jnp.max(jnp.where(visible, scores, -1e9), -1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - top, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    some = total > 0
    out = jnp.einsum("bkgts,bskh->btkgh", weights / jnp.where(some, total, 1.0), v)
    lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    return out.reshape(b, t, n, h), lse[..., 0].transpose(0, 3, 1, 2).reshape(b, t, n)


def both_passes(attend, case, qkv, ids, cotangents):
    (out, lse), pull = jax.vjp(lambda *qkv: attend(case, *qkv, *ids), *qkv)
    dq, dk, dv = pull(tuple(c.astype(x.dtype) for c, x in zip(cotangents, (out, lse), strict=True)))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def poisoned(fn, *args, pool_bytes: int):
    """`fn(*args)` where every result, and the memory that is free, held NaN before."""
    junk = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(fn, *args))
    run = jax.jit(lambda junk, *args: fn(*args), donate_argnums=0, keep_unused=True)
    run = run.lower(junk, *args).compile()
    pool = [jnp.full(pool_bytes // 32, jnp.nan, jnp.float32) for _ in range(8)]
    jax.block_until_ready((pool, junk))
    del pool  # the allocator hands it out again
    return run(junk, *args)


def check(case: Case, pool_bytes: int) -> dict:
    """Compare with float64 on the same device and repeat bit by bit."""
    seed = secrets.randbits(32)
    qkv, ids, cotangents = random_inputs(case, seed)
    fn = functools.partial(both_passes, ours, case)
    found = jax.device_get(poisoned(fn, qkv, ids, cotangents, pool_bytes=pool_bytes))
    again = jax.device_get(jax.jit(fn)(qkv, ids, cotangents))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (qkv, cotangents))
        exact = jax.jit(functools.partial(both_passes, dense, case))
        expected = jax.device_get(exact(wide[0], ids, wide[1]))
    problems, errors = [], {}
    for name, x in expected.items():
        y = found[name].astype(np.float64)
        if not np.array_equal(np.isneginf(x), np.isneginf(y)) or np.isnan(y).any():
            problems.append(f"{name}: NaN, or rows with nothing to see differ")
            continue
        x, y = (np.where(np.isneginf(z), 0.0, z) for z in (x, y))
        errors[name] = float(np.linalg.norm(y - x) / np.linalg.norm(x))
        if not errors[name] < TOLERANCE[case.dtype]:
            problems.append(f"{name}: relative error {errors[name]:.2e}")
        if found[name].tobytes() != again[name].tobytes():
            problems.append(f"{name}: two runs differ")
    return {"case": str(case), "seed": seed, "errors": errors, "problems": problems}


def contenders(case: Case) -> dict:
    """Name -> attention `(q, k, v) -> out` of everything that is compared."""

    def cudnn(q, k, v):
        window = None if case.window is None else (case.window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=case.causal, local_window_size=window, implementation="cudnn"
        )

    def pallas_mha(q, k, v):
        if case.window is not None:
            raise NotImplementedError("no window")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu.attention import mha
        k, v = (jnp.repeat(x, case.heads // case.kv_heads, axis=2) for x in (k, v))
        return mha(q, k, v, None, sm_scale=case.head_dim**-0.5, causal=case.causal)

    def triton(q, k, v):
        options = dict(causal=case.causal, window=case.window, implementation="triton")
        return flash_attention(q, k, v, **options)[0]

    return {"ours": triton, "cudnn": cudnn, "pallas mha": pallas_mha}


def measure(case: Case, rounds: int) -> list[dict]:
    """Median time of a call, forward and forward with backward, of each contender."""
    chip = find(jax.devices()[0].device_kind)
    cache = chip.nvidia.l2_bytes if chip and chip.nvidia else 128 << 20
    nbytes = sum(x.nbytes for x in random_inputs(case, 0)[0])
    copies = max(3, min(32, math.ceil(4 * cache / nbytes)))
    sets = [(*qkv, g) for qkv, _, (g, _) in (random_inputs(case, i) for i in range(copies))]
    rows = []
    for name, attend in contenders(case).items():

        def forward(q, k, v, g, attend=attend):
            return attend(q, k, v)

        def both(q, k, v, g, attend=attend):
            out, pull = jax.vjp(attend, q, k, v)
            return out, *pull(g)

        for label, fn, flops in (("forward", forward, 1.0), ("both", both, 3.5)):
            row = {"case": str(case), "contender": name, "pass": label}
            try:
                times = clock(jax.jit(fn), sets, rounds)
            except Exception as error:  # a contender that cannot is a line of the table
                rows.append(row | {"failed": f"{type(error).__name__}: {str(error)[:200]}"})
                continue
            median = statistics.median(times)
            speed = case.flops() * flops / median
            row |= {"ms": median * 1e3, "ms_min": min(times) * 1e3, "ms_max": max(times) * 1e3}
            row |= {"tflops": speed / 1e12, "of_peak": speed / chip.bf16_flops if chip else None}
            rows.append(row)
    return rows


def clock(fn, sets, rounds: int) -> list[float]:
    """Seconds a call, one number a round. Inputs rotate, and together exceed the cache."""
    for _ in range(2):
        jax.block_until_ready(fn(*sets[0]))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        results = [fn(*inputs) for inputs in sets]
        jax.block_until_ready(results)
        seconds.append((time.perf_counter() - start) / len(sets))
    return seconds


def markdown(report: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"# Flash attention on {report['device']}, {report['date']}", "", versions, ""]
    lines += [report["note"], ""] if report["note"] else []
    lines += ["| case | worst relative error | |", "|---|---|---|"]
    for row in report["correctness"]:
        worst = max(row["errors"].values(), default=math.nan)
        lines.append(f"| {row['case']} | {worst:.1e} | {'; '.join(row['problems']) or 'right'} |")
    if report["timings"]:
        lines += ["", "| case | pass | contender | median ms (min, max) | TFLOP/s | of peak |"]
        lines += ["|---|---|---|---|---|---|"]
    for row in report["timings"]:
        start = f"| {row['case']} | {row['pass']} | {row['contender']} |"
        if "failed" in row:
            lines.append(f"{start} {row['failed'].splitlines()[0][:80]} | | |")
            continue
        peak = f"{row['of_peak']:.0%}" if row["of_peak"] is not None else ""
        span = f"{row['ms']:.3f} ({row['ms_min']:.3f}, {row['ms_max']:.3f})"
        lines.append(f"{start} {span} | {row['tflops']:.1f} | {peak} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny and interpreted, on CPU")
    parser.add_argument("--check-only", action="store_true", help="no timings")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, help="folder for report.json and report.md")
    args = parser.parse_args()
    if args.smoke:
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        parser.error(f"needs a GPU; jax found {jax.default_backend()}. On CPU use --smoke")
    checks, timings = (SMOKE_CHECKS, SMOKE_TIMINGS) if args.smoke else (CHECKS, TIMINGS)
    report = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "note": "Interpreted on CPU: the times below measure nothing." if args.smoke else "",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jax.lib.__version__,
            "platform": jax.devices()[0].client.platform_version.replace("\n", " "),
        },
        "correctness": [check(case, (8 << 20) if args.smoke else (2 << 30)) for case in checks],
        "timings": [],
    }
    if not args.check_only:
        rounds = 1 if args.smoke else args.rounds
        report["timings"] = [row for case in timings for row in measure(case, rounds)]
    print(markdown(report))
    print(json.dumps(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "report.json").write_text(json.dumps(report, indent=1))
        (args.out / "report.md").write_text(markdown(report) + "\n")
    return int(any(row["problems"] for row in report["correctness"]))


if __name__ == "__main__":
    sys.exit(main())
