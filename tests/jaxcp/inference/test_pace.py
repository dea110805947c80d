# SPDX-License-Identifier: Apache-2.0
"""Chunks of prompts that are as long as rows that decode may wait."""

import pytest

from jaxcp.inference.chunks import ChunkBudget
from jaxcp.inference.limits import ChunkLimits, TogetherLimits
from jaxcp.inference.pace import Pace, Work

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
        pace.learn([Work(count, done)], DECODE + taken + compiles * (count not in seen))
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
        pace.know(size, 1, true_seconds(size, 0))
    chunks = prefill(pace, 131_072, 0.1)
    assert chunks[0][0] == 4096 and max(taken for _, taken in chunks) < 0.15


def budget(prompts, *, bounded=False, wait=0.1, seconds=0.01):
    """One whose program for several has three lines of 128 tokens."""
    together = TogetherLimits(rows=3, tokens=128, context=4096, seconds=lambda contexts: seconds)
    limits = ChunkLimits(sizes=SIZES, seconds=true_seconds, max_wait=wait, together=together)
    return ChunkBudget(limits, bounded=bounded, prompts=prompts)


def taken(budget, prompts):
    """The tokens that each prompt gets."""
    counts = []
    for left, context in prompts:
        counts.append(budget.most(left, context))
        if counts[-1]:
            budget.spend(left, counts[-1], context)
    return counts


def test_short_prompts_share_a_program_where_that_is_faster():
    short = [(100, 0), (300, 50), (9, 3000), (40, 0)]
    assert taken(budget(short), short) == [100, 128, 9, 0], "it has three lines"
    assert taken(budget(short, seconds=1.0), short) == [100, 300, 9, 40], "too dear"
    assert taken(budget(short[:1]), short[:1]) == [100], "nobody is beside it"
    assert not budget(short[:1]).joins(100, 0) and budget(short).joins(100, 0)


def test_long_prompts_have_programs_of_their_own():
    """Prompts with much to go, or much before it."""
    mixed = [(9000, 0), (100, 0), (60, 4090), (50, 0)]
    assert taken(budget(mixed), mixed) == [9000, 100, 60, 50]
    assert [budget(mixed).joins(*one) for one in mixed] == [False, True, False, True]


def test_rows_that_decode_wait_for_no_program_that_takes_too_long():
    short = [(100, 0), (300, 50), (200, 0)]
    assert taken(budget(short, bounded=True, wait=0.03), short) == [100, 128, 128]
    late = budget(short, bounded=True, wait=0.008)
    assert not late.joins(100, 0) and taken(late, short) == [64, 0, 0]
    after = budget([(9000, 0), *short], bounded=True, wait=0.03)
    assert taken(after, [(9000, 0), *short]) == [1024, 0, 0, 0], "nothing is left"


def test_without_a_bound_no_clock_decides():
    """Tokens do, those of pads too."""
    unknown = {"wait": float("inf"), "seconds": float("nan")}
    assert budget([(65, 0), (70, 0)], **unknown).joins(65, 0), "384 tokens, not 2,048"
    assert not budget([(64, 0), (60, 0)], **unknown).joins(64, 0), "384 tokens, not 128"
