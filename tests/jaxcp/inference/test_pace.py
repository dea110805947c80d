# SPDX-License-Identifier: Apache-2.0
"""Chunks of prompts that are as long as rows that decode may wait."""

import pytest

from jaxcp.inference.chunks import ChunkBudget
from jaxcp.inference.limits import ChunkLimits
from jaxcp.inference.pace import Pace

SIZES = (8, 64, 1024, 4096, 16_384)
DECODE = 0.02


def true_seconds(count, context):
    """Seconds of a device: a fixed cost, products, and attention over all before."""
    size = next(size for size in SIZES if size >= count)
    return 0.005 + 2e-5 * size + 4e-10 * size * (context + size)


def prefill(pace, tokens, wait, *, compiles=0.0):
    """Chunks of one prompt beside a row that decodes, and the seconds that each added."""
    limits = ChunkLimits(sizes=SIZES, seconds=pace.seconds, max_wait=wait)
    done, chunks, seen = 0, [], set()
    while done < tokens:
        budget = ChunkBudget(limits, bounded=True)
        count = budget.most(tokens - done, done)
        taken = true_seconds(count, done)
        pace.learn([(count, done)], DECODE + taken + compiles * (count not in seen))
        pace.learn([], DECODE)
        seen.add(count)
        chunks.append((count, taken))
        done += count
    return chunks


@pytest.mark.parametrize("wait", [0.1, 0.5])
def test_a_long_prompt_comes_in_chunks_that_keep_the_bound(wait):
    pace = Pace(SIZES)
    chunks = prefill(pace, 131_072, wait, compiles=30.0)
    assert max(taken for _, taken in chunks) < 1.5 * wait
    # and takes little longer than the largest chunks that keep it
    best, done = 0.0, 0
    while done < 131_072:
        size = max(size for size in SIZES if true_seconds(size, done) <= wait or size == 8)
        best, done = best + true_seconds(size, done), done + size
    assert sum(taken for _, taken in chunks) < 2 * best


def test_a_short_context_is_fast_again_after_a_long_one():
    pace = Pace(SIZES)
    prefill(pace, 131_072, 0.2)
    sizes = [count for count, _ in prefill(pace, 20_000, 0.2)]
    assert max(sizes) >= 4096


def test_what_was_never_seen_is_tried_small():
    pace = Pace(SIZES)
    assert pace.seconds(8, 0) == float("inf")
    limits = ChunkLimits(sizes=SIZES, seconds=pace.seconds, max_wait=0.1)
    assert ChunkBudget(limits, bounded=True).most(10_000, 0) == 8
    assert ChunkBudget(limits, bounded=False).most(100_000, 0) == 16_384, "nobody waits"


def test_what_is_known_beforehand_is_used():
    pace = Pace(SIZES)
    for size in SIZES:
        pace.know(size, true_seconds(size, 0))
    chunks = prefill(pace, 131_072, 0.1)
    assert chunks[0][0] == 4096 and max(taken for _, taken in chunks) < 0.15
