# SPDX-License-Identifier: Apache-2.0
"""The programs of grouped matmul and decode attention, and the cycles of their parts."""

import importlib.util
import math

import jax
import jax.numpy as jnp

from pallas_kernels.devices import CHIPS

EXPERTS, EMBED, WIDTH = 192, 4096, 1536  # Hy3
TOKENS_PER_EXPERT = (8, 512)
DECODE = dict(slots=65536, heads=64, kv_heads=8, head_dim=128)  # Hy3, one query

# GHz that the medians published in tokamax 0.0.17's autotuning data imply for its own kernels
# (cycles counted here / milliseconds there), the lowest of each chip; v5e: peak / MXU size.
CLOCK = {"v5e": 1.5, "v5p": 1.51, "v6e": 1.42, "tpu7x": 1.71}
CORES = {"v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 2}  # TensorCores that share a chip's HBM


def hbm_cycles(chip: str, nbytes: float) -> float:
    """Core cycles in which one core's share of the HBM bandwidth brings `nbytes`."""
    return nbytes * CORES[chip] / CHIPS[chip].hbm_bytes_per_second * CLOCK[chip] * 1e9


def there(op: str, backend: str) -> bool:
    return importlib.util.find_spec(f"pallas_kernels.{op}.{backend}") is not None


def matmul(tokens, implementation, weights=jnp.bfloat16):
    """`(fn, args)` of one product at Hy3's shapes, `tokens` an expert."""
    from pallas_kernels.grouped_matmul import Quantised, grouped_matmul

    def run(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, implementation=implementation)

    lhs, rhs, sizes = _operands(tokens, weights)
    if weights != jnp.bfloat16:
        scales = jax.ShapeDtypeStruct((EXPERTS, 1, WIDTH), jnp.float32)
        rhs = Quantised(rhs, scales)
    return run, (lhs, rhs, sizes)


def block_scaled(tokens, format):
    """`(fn, args)` of the product of rows and weights in "mxfp8" or "nvfp4"."""
    from pallas_kernels.grouped_matmul import block_scaled as narrow

    lhs, rhs, sizes = _operands(tokens)
    tall = jax.ShapeDtypeStruct((EXPERTS, WIDTH, EMBED), rhs.dtype)
    weights = jax.eval_shape(lambda w: narrow.block_scaled(w, format), tall)
    return narrow.grouped_matmul_block_scaled, (lhs, weights, sizes)


def _operands(tokens, weights=jnp.bfloat16):
    return (
        jax.ShapeDtypeStruct((EXPERTS * tokens, EMBED), jnp.bfloat16),
        jax.ShapeDtypeStruct((EXPERTS, EMBED, WIDTH), weights),
        jax.ShapeDtypeStruct((EXPERTS,), jnp.int32),
    )


def ragged_dot(tokens, chosen: list):
    """`(fn, args)` of tokamax's; the tile sizes that it chooses are put into `chosen`."""
    from tokamax._src.ops.gmm_v2 import gmm_v2 as kernel

    def tile_sizes(*args, **kwargs):
        chosen.append(kernel.calculate_tiling(*args, **kwargs))
        return chosen[-1]

    def run(lhs, rhs, sizes):
        return kernel.gmm_v2(lhs, rhs, sizes, tile_info=tile_sizes, zero_initialize=False)

    return run, _operands(tokens)


def our_expert_cycles(kernel: dict, tokens: int, block) -> float:
    """Bundles that one expert's product takes: pieces of a block, and what a grid step adds."""
    rows, deep = math.ceil(tokens / block.rows), math.ceil(EMBED / block.k)
    pieces = rows * math.ceil(WIDTH / block.columns) * deep
    steps = math.ceil(tokens / block.m) * math.ceil(WIDTH / block.n) * deep
    return pieces * kernel["hot"][0]["bundles"] + steps * kernel["around"]


def their_expert_cycles(kernel: dict, tokens: int, tile) -> float:
    """As above for tokamax's, which has code for several numbers of rows and picks the fitting."""
    work = [h["floors"].get("MATMUL", 0) for h in kernel["hot"]]
    wanted = min(work) if tokens < tile.tile_m else max(work)
    fitting = [h for h, n in zip(kernel["hot"], work, strict=True) if 0.9 < n / wanted < 1.1]
    steps = math.prod(
        (
            math.ceil(WIDTH / tile.tile_n),
            math.ceil(EMBED / tile.tile_k),
            math.ceil(tokens / tile.tile_m),
        )
    )
    return steps * (kernel["around"] + min(h["bundles"] for h in fitting))


def decode(dtype, implementation):
    """`(fn, args)` of one query a head against a long cache, 8 query heads a KV head."""
    from pallas_kernels.decode_attention import decode_attention

    def run(q, k, v, q_positions, kv_positions, *scales):
        k_scale, v_scale = scales or (None, None)
        return decode_attention(
            q,
            k,
            v,
            q_positions=q_positions,
            kv_positions=kv_positions,
            k_scale=k_scale,
            v_scale=v_scale,
            implementation=implementation,
        )

    slots, heads, kv_heads, head_dim = DECODE.values()
    cache = jax.ShapeDtypeStruct((1, slots, kv_heads, head_dim), dtype)
    ids = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (1, slots)]
    scale = jax.ShapeDtypeStruct((1, slots, kv_heads), jnp.float32)
    scales = [] if dtype == jnp.bfloat16 else [scale, scale]
    q = jax.ShapeDtypeStruct((1, 1, heads, head_dim), jnp.bfloat16)
    return run, (q, cache, cache, *ids, *scales)


def step_cycles(kernel: dict, block) -> float:
    """Bundles of an unmasked step of our decode kernel: its branch comes before the masked one.

    A branch scores the keys and weighs the values, each in a loop over `sub` rows of the block.
    """
    hot = sorted(kernel["hot"], key=lambda h: h["first"])
    branch = hot[: len(hot) // 2]
    looped = min(h["loops"] for h in branch) > 1
    rows = max(shape[-2] for _, shape, _ in kernel["windows"] if len(shape) > 1)
    trips = rows // math.gcd(block.sub, rows) if looped else 1
    return trips * sum(h["bundles"] for h in branch) + kernel["around"]


def block_bytes(windows: list) -> int:
    """Bytes that a step of a decode kernel fetches: its two largest windows, keys and values."""
    return sum(sorted((nbytes for _, _, nbytes in windows), reverse=True)[:2])
