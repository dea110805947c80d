# SPDX-License-Identifier: Apache-2.0
"""The fused ring becomes machine code for TPUs that are not there, and XLA adds no traffic to it.

What it computes, and that nothing races, `tests/jaxcp/context_parallel/test_fused_ring.py` tests.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but

from jaxcp.compile import parse_target
from pallas_kernels import ring_attention
from pallas_kernels.flash_attention import tuning

TOKENS, HEADS, KV_HEADS, WIDTH = 8192, 16, 2, 128  # of a device
INSTRUCTION = re.compile(r"%([\w.-]+) = \(?(\w+\[[\d,]*\]\S*).*? ([a-z][\w-]*)\(")
MOVES = ("all-gather", "copy", "transpose")
SHARD = TOKENS * KV_HEADS * WIDTH


def compiled(target, *, bidirectional):
    """The text of forward and backward, every array as a projection leaves it: `[B, T, N * H]`."""
    parsed = parse_target(target)
    mesh = parsed.mesh(seq=parsed.size)

    def apart(x):
        return x.reshape(*x.shape[:2], -1, WIDTH)

    def local(q, k, v, positions, dout):
        def attend(q, k, v):
            out, lse = ring_attention(
                apart(q), apart(k), apart(v),
                axis_name="seq", q_positions=positions, kv_positions=positions,
                bidirectional=bidirectional,
            )  # fmt: skip
            return out.reshape(q.shape), lse

        (out, lse), pull = jax.vjp(attend, q, k, v)
        return out, *pull((dout, lse))

    def array(*width, dtype=jnp.bfloat16):
        by_tokens = NamedSharding(mesh, P(None, "seq"))
        shape = (1, TOKENS * mesh.size, *width)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=by_tokens)

    q, kv = array(HEADS * WIDTH), array(KV_HEADS * WIDTH)
    run = jax.shard_map(
        local, in_specs=(P(None, "seq"),) * 5, out_specs=(P(None, "seq"),) * 4, check_vma=False
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(run).trace(q, kv, kv, array(dtype=jnp.int32), q)
        return traced.lower(lowering_platforms=("tpu",)).compile().as_text()


@pytest.mark.parametrize(
    ("target", "bidirectional"),
    slow_but(
        [("v5e:2x4", False), ("v5p:2x2x1", True), ("v6e:2x2", True), ("tpu7x:2x2x1", False)],
        lambda case: case[0] == "v5p:2x2x1",
    ),
)
def test_it_compiles_and_only_the_kernels_move_keys(monkeypatch, target, bidirectional):
    if target != "v6e:2x2":  # one of them with the blocks it runs with, the others faster
        small = tuning.Blocks(q=256, kv=256, sub=256, strip=256)
        rows = tuple((op, "", 256, 4, small) for op in ("mosaic_forward", "mosaic_backward"))
        monkeypatch.setattr(tuning, "TABLE", (*rows, *tuning.TABLE))
    text = compiled(target, bidirectional=bidirectional)
    assert "collective-permute" not in text and "all-to-all" not in text
    made = {name: (shape, op) for name, shape, op in INSTRUCTION.findall(text)}
    kernels = re.findall(
        r"%\S*ring_attention_(forward|backward)\S* = .* custom-call\((.*?)\), custom_call_target",
        text,
    )
    assert sorted(kernel for kernel, _ in kernels) == ["backward", "forward"]
    for kernel, operands in kernels:
        given = [made[name] for name in re.findall(r"%([\w.-]+)", operands)]
        keys = [op for shape, op in given if size(shape) == SHARD]
        assert keys == ["parameter", "parameter"], f"{kernel}: K and V come from {keys}"
    moved = [(shape, op) for shape, op in made.values() if op.startswith(MOVES)]
    assert any(op.startswith("all-gather") for _, op in moved), "of positions"
    for shape, op in moved:
        assert not op.startswith("all-gather") or size(shape) < SHARD, (op, shape)
        # keys, two slots, three of gradients; what XLA fetches into VMEM, S(1), it would read there
        assert size(shape) not in (SHARD, 2 * SHARD, 3 * SHARD) or "S(1)" in shape, (op, shape)


def size(shape):
    return math.prod(int(x) for x in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if x)
