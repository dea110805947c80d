# SPDX-License-Identifier: Apache-2.0
"""Compiled for chips that are not there: what travels, what hides it, and that nothing is copied.

One program a chip holds the ring and its gradient, and every test reads a fact off it.
"""

import jax
import pytest
from compiled_attention import CHIPS, KEYS, QUERIES, TOKENS, compiled, mesh_over
from slow import slow_but

import jaxcp
from jaxcp.compile import Copy, Transfer, collectives, copies, kernel_calls, transfers
from jaxcp.context_parallel import compiler_options

# jax 0.11 and later warn when Pallas-Triton is used; it works through 0.12.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

N = 8  # shards
EVERY_CHIP = slow_but(CHIPS, lambda where: where == "sm_120")
ROTATED = 2 * KEYS * 2 + TOKENS * 4  # bytes: K and V in bfloat16, positions
GRADIENTS = 2 * KEYS * 4  # bytes: dK and dV in float32


def ring(where):
    return compiled(where, jaxcp.Ring(), backward=True).text


@pytest.mark.slow
@pytest.mark.parametrize("where", EVERY_CHIP)
def test_ring_sends_what_it_says(where):
    """Forward n-1 rotations of K, V and positions; backward as many, and of dK and dV."""
    (permutes,) = collectives(ring(where))
    assert permutes.kind == "collective-permute"
    assert permutes.bytes == (N - 1) * (2 * ROTATED + GRADIENTS)
    if where != "sm_120":  # XLA on GPU sends those of a rotation together, if they are small
        assert permutes.count == (N - 1) * (3 + 3 + 2)


@pytest.mark.parametrize("where", EVERY_CHIP)
def test_a_ring_runs_one_kernel_a_shard(where):
    backward = 2 if where == "sm_120" else 1  # dQ and dK/dV apart
    assert kernel_calls(ring(where)) == N + N * backward


@pytest.mark.parametrize("where", EVERY_CHIP)
def test_every_rotation_but_one_hides_behind_a_kernel(where):
    """It starts before the kernel of the step that goes on, and is done after it.

    Not the backward pass's first: nothing can be done with K/V before they are there.
    """
    large = [t for t in transfers(ring(where)) if t.bytes >= KEYS]
    exposed = sum(t.bytes * t.count for t in large if not t.kernels)
    assert exposed in (2 * KEYS * 2, ROTATED)
    assert sum(t.bytes * t.count for t in large) >= (N - 1) * (2 * 2 * KEYS * 2 + GRADIENTS)
    # and no shard waits: none is in flight for more than the kernels of one step
    assert max(t.kernels for t in large) == (2 if where == "sm_120" else 1)


@pytest.mark.parametrize("where", EVERY_CHIP)
def test_no_copy_of_keys_values_or_their_gradients(where):
    """On TPU q, out and their gradients are laid out anew, once a call and never in a loop."""
    found = copies(ring(where), KEYS * 2)
    assert {x.bytes for x in found} <= (set() if where == "sm_120" else {QUERIES * 2})
    assert all(x.count == 1 for x in found)
    assert QUERIES * 2 not in (KEYS * 2, KEYS * 4)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["sm_120", "tpu7x"])
def test_a_chunk_is_gathered_beside_the_kernel_of_the_one_before(where):
    """Not on v5p and v6e, whose all-gather is synchronous."""
    found = compiled(where, jaxcp.AllGather(chunks=4)).text
    large = [t for t in transfers(found) if t.bytes >= KEYS // 4]
    whole = sum(t.bytes for t in large)
    assert N * 2 * KEYS * 2 <= whole <= N * ROTATED
    hidden = sum(t.bytes for t in large if t.kernels)
    assert hidden >= whole * 3 // 4 - N * TOKENS * 4


def test_options_are_those_of_the_mesh():
    assert compiler_options() == {} == compiler_options("tpu")
    assert compiler_options("gpu") == compiler_options("cuda") != {}
    with jax.sharding.use_abstract_mesh(mesh_over("sm_120").abstract_mesh):
        assert compiler_options() == compiler_options("gpu")
    with jax.sharding.use_abstract_mesh(mesh_over("v6e").abstract_mesh):
        assert compiler_options() == {}


HLO = """HloModule m, is_scheduled=true

%move (a: bf16[4,8]) -> bf16[8,4] {
  %a = bf16[4,8]{1,0} parameter(0)
  ROOT %t = bf16[8,4]{1,0} transpose(%a), dimensions={1,0}
}

%scatter (b: bf16[4,8]) -> bf16[1,8] {
  %b = bf16[4,8]{1,0} parameter(0)
  %sum = bf16[4,8]{1,0} all-reduce(%b), to_apply=%add
  ROOT %s = bf16[1,8]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={1,8}
}

%gather (c: bf16[4,8]) -> bf16[32,8] {
  %c = bf16[4,8]{1,0} parameter(0)
  ROOT %g = bf16[32,8]{1,0} all-gather(%c), dimensions={0}
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %near = (bf16[4,8]{1,0:S(1)}, bf16[4,8]{1,0}, u32[]) copy-start(%x)
  %far = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]) copy-start(%x)
  %p = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]) collective-permute-start(%x)
  %q = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%x), a={"is_sync":true}
  %g = ((bf16[4,8]{1,0}), bf16[32,8]{1,0}, u32[]) async-start(%x), calls=%gather
  %k = bf16[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  %u = ((bf16[4,8]{1,0}), bf16[32,8]{1,0}, u32[]) async-update(%g)
  %pd = bf16[4,8]{1,0} collective-permute-done(%p)
  %l = bf16[4,8]{1,0} custom-call(%pd), custom_call_target="tpu_custom_call"
  %qd = bf16[4,8]{1,0} collective-permute-done(%q)
  %gd = bf16[32,8]{1,0} async-done(%u)
  %m = bf16[8,4]{1,0} fusion(%l), kind=kLoop, calls=%move
  %r = bf16[1,8]{1,0} fusion(%l), kind=kCustom, calls=%scatter
  ROOT %z = bf16[4,8]{1,0} copy(%l)
}
"""


def test_a_schedule_is_read():
    """Pairs, a wrapped and a fused collective, one in name only asynchronous; copies that are."""

    def transfer(kind, size, kernels):
        return Transfer(kind=kind, bytes=size, count=1, kernels=kernels)

    assert transfers(HLO) == [
        transfer("collective-permute", 64, 1),
        transfer("collective-permute", 64, 0),
        transfer("all-gather", 512, 2),
        transfer("reduce-scatter", 64, 0),
    ]
    assert copies(HLO, 64) == [
        Copy(opcode=opcode, bytes=64, count=1) for opcode in ("copy", "fusion", "copy")
    ]
    assert copies(HLO, 65) == []
