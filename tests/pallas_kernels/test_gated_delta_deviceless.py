# SPDX-License-Identifier: Apache-2.0
"""The kernels of the gated delta rule become machine code for chips that are not there."""

import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but

from jaxcp.compile import compile_for, parse_target
from pallas_kernels.gated_delta import gated_delta, gated_delta_chunks

# 2026-11: jax 0.11 and later warn when Pallas-Triton is used; it works through 0.12.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

GPUS, TPUS = ("rtx-pro-6000:2", "h200:2"), ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
BY_HEAD = P(None, None, "seq")
ROWS, TOKENS, KEY_HEADS, HEADS, WIDTH = 2, 256, 2, 4, 128


@pytest.mark.parametrize(
    ("target", "dtype", "by_channel"),
    slow_but(
        itertools.product((*GPUS, *TPUS), ("bfloat16", "float32"), (False, True)),
        lambda case: case in [(GPUS[0], "bfloat16", False), (TPUS[2], "bfloat16", True)],
    ),
)
def test_forward_and_backward_compile(target, dtype, by_channel):
    """Heads spread over devices, and a state that does not vary over them."""
    described = parse_target(target)
    mesh = described.mesh(seq=described.size)

    def array(*shape, dtype=dtype, spec=BY_HEAD):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    heads, keys = HEADS * mesh.size, KEY_HEADS * mesh.size
    k, v = array(ROWS, TOKENS, keys, WIDTH), array(ROWS, TOKENS, heads, WIDTH)
    gate = array(ROWS, TOKENS, heads, *[WIDTH] * by_channel, dtype=jnp.float32)
    beta = array(ROWS, TOKENS, heads, dtype=jnp.float32)
    state = array(ROWS, HEADS, WIDTH, WIDTH, dtype=jnp.float32, spec=P())

    def local(q, k, v, gate, beta, state):
        out, after = gated_delta(q, k, v, gate, beta, state=state)
        return out, after

    def loss(*arrays):
        specs = [x.sharding.spec for x in (k, k, v, gate, beta, state)]
        run = jax.shard_map(local, in_specs=tuple(specs), out_specs=(BY_HEAD, P(None, "seq")))
        out, after = run(*arrays)
        return out.astype(jnp.float32).sum() + after.sum()

    report = compile_for(
        jax.value_and_grad(loss, (0, 1, 2, 3, 4, 5)), (k, k, v, gate, beta, state), mesh
    )
    forward = 1 if target in GPUS and dtype == "float32" else 2
    backward = 2 if target in GPUS else 3  # the states are made again, and on GPUs XLA does a part
    # None: some programs of libtpu cannot be read by the jaxlib of jax 0.10
    assert report.kernels in (forward + backward, None)


@pytest.mark.parametrize("target", slow_but([*GPUS, *TPUS], lambda case: case == GPUS[0]))
def test_pieces_of_a_sequence_compile(target):
    """The summary walks a state of more columns than any head has."""
    described = parse_target(target)
    mesh = described.mesh(seq=described.size)
    k, beta = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
        for shape, dtype in (((1, 128, 2, WIDTH), jnp.bfloat16), ((1, 128, 2), jnp.float32))
    )

    def local(k, beta):
        chunks = gated_delta_chunks(k, k, k, -beta, beta)
        return chunks.summary(), chunks.outputs(jnp.zeros((1, 2, WIDTH, WIDTH)), 128)

    run = jax.shard_map(local, in_specs=(P(), P()), out_specs=P())
    assert compile_for(run, (k, beta), mesh).kernels in (3, None)


SPILLS = """
import json
from jaxcp.compile.machine_code import Compiler
compiler = Compiler("rtx-pro-6000")
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from pallas_kernels.gated_delta import gated_delta

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(compiler.mesh, P()))

found = {}
for kind in ((), (128,)):
    k, beta = array(1, 128, 2, 128), array(1, 128, 2, dtype=jnp.float32)
    gate = array(1, 128, 2, *kind, dtype=jnp.float32)
    def loss(*arrays):
        out, state = gated_delta(*arrays)
        return out.astype(jnp.float32).sum() + state.sum()
    done = compiler(jax.grad(loss, (0, 1, 2, 3, 4)), (k, k, k, gate, beta))
    found |= {f"{name} {kind}": kernel.spilled_bytes for name, kernel in done.kernels.items()}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_no_kernel_spills_on_sm_120():
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SPILLS], env=environment, capture_output=True,
        text=True, timeout=600, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 6 and not any(found.values()), found
