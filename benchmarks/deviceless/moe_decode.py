# SPDX-License-Identifier: Apache-2.0
"""The programs of grouped matmul and decode attention, and the cycles of their parts."""

from jaxcp.tune import programs, tpu_cost

EXPERTS, EMBED, WIDTH = 192, 4096, 1536  # Hy3
TOKENS_PER_EXPERT = (8, 512)
ROW_FLOPS = 4 * 8 * 128  # of a row of the cache: scores and values of 8 query heads


def matmul(tokens, implementation):
    """`(fn, args)` of one product at Hy3's shapes, `tokens` an expert."""
    return programs.matmul(implementation, experts=EXPERTS, embed=EMBED, width=WIDTH, tokens=tokens)


def decode(cache, implementation):
    """`(fn, args)` of one query a head against a long cache, 8 query heads a KV head."""
    return programs.decode(implementation, cache=cache, **programs.DECODE)


def ragged_dot(tokens, chosen: list):
    """`(fn, args)` of tokamax's; the tile sizes that it chooses are put into `chosen`."""
    from tokamax._src.ops.gmm_v2 import gmm_v2 as kernel

    def tile_sizes(*args, **kwargs):
        chosen.append(kernel.calculate_tiling(*args, **kwargs))
        return chosen[-1]

    def run(lhs, rhs, sizes):
        return kernel.gmm_v2(lhs, rhs, sizes, tile_info=tile_sizes, zero_initialize=False)

    return run, matmul(tokens, "mosaic_tpu")[1]


def their_expert_cycles(chip: str, kernel, tokens: int, tile) -> float:
    """Cycles of tokamax's kernel, by its code for the least number of rows that fits."""
    rows = min(tokens, tile.tile_m)
    flops = 2 * rows * min(tile.tile_n, WIDTH) * min(tile.tile_k, EMBED)
    fitting = [h for h in kernel.hot if tpu_cost.holds(chip, h, flops)]
    if not fitting:
        raise ValueError(f"tokamax has no region that does {flops:.3g} FLOPs")
    steps = -(-WIDTH // tile.tile_n) * -(-EMBED // tile.tile_k) * -(-tokens // tile.tile_m)
    return steps * (kernel.around + min(tpu_cost.cycles(chip, h, flops) for h in fitting))
