# SPDX-License-Identifier: Apache-2.0
"""How many programs a conversation compiles, and what each of its pieces may cost."""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxcp
from jaxcp import Contiguous, GPTConfig, Zigzag
from jaxcp.inference import steps, turns
from jaxcp.weights.placement import place

BOUND = 12


def conversation(rng, max_len, rows):
    """`(start, lengths)` of turns: of any length, in each row its own, until a row is full."""
    start = np.zeros(rows, int)
    for _ in range(30):
        lengths = np.exp(rng.uniform(0, np.log(max_len / 3), rows)).astype(int) + 1
        lengths = np.where(rng.random() < 0.3, lengths[0], lengths)
        lengths = np.minimum(lengths, max_len - start)
        if lengths.min() < 1:
            return
        yield start, lengths
        start = start + lengths


def programs(frame, talk, layout, sizes=steps.EXTEND_SIZES):
    """Of the pieces of a conversation; a step of decoding is none."""
    found = set()
    for start, lengths in talk:
        for piece in turns.pieces(frame, start, lengths, layout, sizes):
            if piece.order.shape[1] > 1 or not piece.taken.all():
                found.add(piece.program)
    return found


@pytest.mark.parametrize("windows", [(), (None, 33), (4, 128, 2000, None)], ids=str)
@pytest.mark.parametrize("shards, max_len", [(1, 300), (1, 10**6), (2, 9_000), (8, 300_000)])
def test_no_conversation_compiles_more_than_twelve_programs(shards, max_len, windows):
    slots = -(-max_len // shards) + 64
    frame = turns.Frame(shards=shards, slots=slots, windows=windows)
    for seed in range(4):
        rng, layout = np.random.default_rng(seed), (Zigzag(), Contiguous())[seed % 2]
        talk = conversation(rng, max_len, rows=1 + seed // 2)
        assert len(programs(frame, talk, layout)) <= BOUND


@pytest.mark.parametrize("shards", [1, 8])
def test_nor_over_a_compressed_cache(shards):
    for seed in range(2):
        talk = conversation(np.random.default_rng(seed), 10**6, rows=1 + seed)
        frame = turns.Frame(shards=shards)
        assert len(programs(frame, talk, Zigzag())) <= BOUND


def test_pads_are_few_and_calls_too():
    """A third more tokens at most, but for the narrowest piece; a few calls, but for the widest."""
    shards = 4
    frame = turns.Frame(shards=shards, slots=10**6)
    narrow, wide = shards * turns.WIDTHS[0], shards * turns.WIDTHS[-1]
    for length in (65, 100, 383, 1000, 5_000, 12_345, 60_000, 200_000):
        cut = list(turns.pieces(frame, [1000], [length], Zigzag(), steps.EXTEND_SIZES))
        assert sum(piece.taken[0] for piece in cut) == length
        assert sum(piece.order.shape[1] for piece in cut) <= max(narrow, 4 / 3 * length + narrow)
        assert len(cut) <= length // wide + 3 * len(turns.WIDTHS) + 1
        assert {piece.used for piece in cut if piece.sharded} <= {10**6, 10**6 // turns.PART}


def test_an_empty_cache_is_not_looked_at():
    frame = turns.Frame(shards=8, slots=10**6)
    (piece,) = turns.pieces(frame, [0], [100_000], Zigzag(), steps.EXTEND_SIZES)
    assert piece.used is None and piece.order.shape[1] < 1.07 * 100_000


def test_an_agents_turns_run_what_was_compiled(mesh_of):
    """Turns of 65 to 400 tokens: counted where XLA compiles, and right to the last one."""
    compiled = []

    def heard(event, _, fun_name="", **more):
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    size = {"vocab_size": 64, "max_positions": 8192, "num_layers": 1}
    model = jaxcp.GPT(GPTConfig(**size, num_heads=2, embed_dim=16), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 64, (1, 1200))
    ends = np.cumsum([100, 65, 250, 399, 80, 306])
    mesh_of(seq=2)
    model = place(model)
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        cache = model.init_cache(1, 8192)
        for start, end in zip([0, *ends], ends, strict=False):
            logits, cache = jaxcp.prefill(model, cache, tokens[:, start:end], donate=start != 415)
            if start == 0:
                first, compiled = compiled, []
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert first.count("jit(prefill_piece)") == 1
    assert 1 <= sum(name in ("jit(prefill_piece)", "jit(extend_piece)") for name in compiled) <= 3
    expected = jaxcp.logits(model, tokens[:, : ends[-1]])[:, -1]
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=0)
