# SPDX-License-Identifier: Apache-2.0
"""Pages and states that go to the host's memory come back as they were, wherever they lie."""

import jax
import numpy as np
import pytest
from slow import slow_but
from test_engine_kinds import cache_dtype, load

from jaxcp.inference.geometry import geometry_of
from jaxcp.inference.host_copies import PAGES_A_CALL, HostCopies
from jaxcp.inference.host_store import nobodys_block
from jaxcp.inference.plan import Plan

CASES = [
    ("full", {}),
    ("windows", {"seq": 3}),
    ("latents", {"seq": 8}),
    ("blocks", {"data": 2, "seq": 2}),
    ("full, int8", {"data": 2, "seq": 2}),
    ("windows, int8", {"seq": 2, "model": 2}),
    ("full, float8_e4m3fn", {"model": 2, "expert": 2}),
]
PAGES = PAGES_A_CALL + 3


def noise(x, key):
    """Numbers in place of an array of the pool."""
    values = np.random.default_rng(key).integers(1, 100, x.shape)
    return jax.device_put(values.astype(x.dtype), x.sharding)


def content(pool):
    return [np.asarray(x.astype("float32")) for x in jax.tree.leaves(pool.layers)]


@pytest.mark.parametrize(
    ("name", "axes"), slow_but(CASES, lambda case: case in (CASES[0], CASES[3]))
)
def test_what_comes_back_is_what_left(name, axes, mesh_of):
    """More pages than a call copies, and each state, to other places of a pool that lost all."""
    if axes:
        mesh_of(**axes)
    model = load(name)
    tokens = 32 * PAGES * axes.get("data", 1) * axes.get("seq", 1)
    g = geometry_of(
        model, max_len=64, max_rows=axes.get("data", 1), pool_tokens=tokens, memory=None,
        cache_dtype=cache_dtype(name), host_memory=1 << 30,
    )  # fmt: skip
    assert g.pages_per_shard == PAGES
    copies, empty = HostCopies(g), model.init_pool(**g.room())
    empty = copies.begin(empty)
    assert copies.seconds_a_call > 0 and not any(x.any() for x in content(empty))
    leaves, tree = jax.tree.flatten(empty)
    pool = jax.tree.unflatten(tree, [noise(x, key) for key, x in enumerate(leaves)])
    pages = [nobodys_block() for _ in range(g.shards * PAGES)]
    states = [nobodys_block() for _ in range(g.states)]
    out = [Plan(pages_out=[*enumerate(pages)], states_out=[*enumerate(states)])]
    others = [nobodys_block() for _ in range(3)]  # another group's, fewer
    out += [Plan(pages_out=[*enumerate(others)])] * (g.groups - 1)
    copies.save(pool, out)
    back = [
        Plan(
            pages_in=[(block, turned(page, PAGES)) for page, block in enumerate(pages)],
            states_in=[(block, (state + 1) % g.states) for state, block in enumerate(states)],
        )
    ]
    back += [Plan(pages_in=[*zip(others, range(3), strict=True)])] * (g.groups - 1)
    was = content(pool)
    after = content(copies.load(empty, back))
    for before, now, paged in zip(was, after, pool.paged, strict=True):
        shape = (g.groups, g.shards, PAGES) if paged else (g.groups, g.states)
        x, y = (np.moveaxis(z, 1, 0).reshape(*shape, -1) for z in (before, now))
        assert (y[0] == np.roll(x[0], 1, axis=len(shape) - 2)).all()
        if paged:
            assert (y[1:, 0, :3] == x[1:, 0, :3]).all()
            assert not y[1:, 0, 3:].any() and not y[1:, 1:].any()
        else:
            assert not y[1:].any()
    assert size(pages[0]) == g.host.page_bytes
    if states:
        assert 0 <= size(states[0]) - g.host.state_bytes < 8 * jax.device_count(), "pads"


def size(block):
    """Bytes on the host."""
    return sum(x.nbytes for own in block.content.values() for x in own)


def turned(page, count):
    """The next page of the same shard."""
    return page // count * count + (page + 1) % count
