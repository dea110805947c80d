# SPDX-License-Identifier: Apache-2.0
"""The grouped matmul's kernels become machine code for chips that are not there.

Compiling proves what the interpreter cannot: tiling, shared memory and VMEM. That the machine code
computes the right thing takes the chip.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but

from jaxcp.compile import compile_for, parse_target
from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul import Quantized, quantize
from pallas_kernels.grouped_matmul.quantized import FORMATS

# 2026-11: jax 0.11 and later warn when Pallas-Triton is used; it works through 0.12.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

GPUS, TPUS = ("rtx-pro-6000:2", "h200:2"), ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
EXPERTS, EMBED, MLP = 6, 512, 384


def described(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def mesh_of(target):
    return parse_target(target).mesh(seq=parse_target(target).size)


@pytest.mark.parametrize(
    ("target", "dtype"),
    slow_but(
        [*((t, "bfloat16") for t in (*GPUS, *TPUS)), (GPUS[0], "float32"), (TPUS[2], "float32")],
        lambda case: case in [(GPUS[0], "bfloat16"), (TPUS[2], "bfloat16")],
    ),
)
def test_an_expert_layer_and_its_gradient_compile(target, dtype):
    """Rows spread over devices, weights whole on each: their gradient is summed over devices."""
    mesh = mesh_of(target)
    rows = described(mesh, (160 * mesh.size, EMBED), dtype, "seq")
    sizes = described(mesh, (EXPERTS * mesh.size,), jnp.int32, "seq")
    wide = described(mesh, (EXPERTS, EMBED, MLP), dtype)
    back = described(mesh, (EXPERTS, MLP, EMBED), dtype)

    def local(rows, sizes, gate, up, down):
        hidden = grouped_swiglu(rows, gate, up, sizes, clamp=10.0)
        return grouped_matmul(hidden, down, sizes)

    def loss(rows, gate, up, down, sizes):
        specs = P("seq"), P("seq"), P(), P(), P()
        out = jax.shard_map(local, in_specs=specs, out_specs=P("seq"))(rows, sizes, gate, up, down)
        return out.astype(jnp.float32).sum()

    report = compile_for(
        jax.value_and_grad(loss, (0, 1, 2, 3)), (rows, wide, wide, back, sizes), mesh
    )
    # None: some programs of libtpu cannot be read by the jaxlib of jax 0.10
    assert report.kernels in (8, None), "forward 2; for each of three weights: dlhs and drhs"


@pytest.mark.parametrize(("values", "block"), [("int8", False), ("float8_e4m3fn", True)])
@pytest.mark.parametrize("target", slow_but([GPUS[0], TPUS[0], TPUS[3]], lambda x: x == GPUS[0]))
def test_weights_of_8_bits_compile(target, values, block):
    mesh = mesh_of(target)
    rows = described(mesh, (256, EMBED), jnp.bfloat16)
    sizes = described(mesh, (EXPERTS,), jnp.int32)
    scales = (EXPERTS, EMBED // 128, MLP // 128) if block else (EXPERTS, 1, MLP)
    weights = Quantized(
        described(mesh, (EXPERTS, EMBED, MLP), values), described(mesh, scales, jnp.float32)
    )

    def loss(rows, weights, sizes):
        run = jax.shard_map(grouped_matmul, in_specs=(P(), P(), P()), out_specs=P())
        return run(rows, weights, sizes).astype(jnp.float32).sum()

    report = compile_for(jax.value_and_grad(loss), (rows, weights, sizes), mesh)
    assert report.kernels in (2, None), "no gradient but that of the rows"
    assert report.temp_bytes < EXPERTS * EMBED * MLP * 2, "no weights in 16 bits"


def integers_in_groups(weights):
    """As GPTQ's 8 bits are kept: a scale in the checkpoint's dtype for 64 rows."""
    e, d, f = weights.shape
    return Quantized(weights.astype(jnp.int8), jnp.ones((e, d // 64, f), jnp.bfloat16))


def with_zeros(weights, group):
    four = quantize(weights, "int4", group=group)
    scales, zeros = four.scales.astype(jnp.bfloat16), jnp.zeros(four.scales.shape, jnp.int8)
    return dataclasses.replace(four, scales=scales, zeros=zeros)


IN_GROUPS = {
    **{format: functools.partial(quantize, format=format) for format in FORMATS},
    "int4 in 32": functools.partial(quantize, format="int4", group=32),
    "int4 in 64": functools.partial(quantize, format="int4", group=64),
    "int8 in 64": integers_in_groups,
    "int4 in 32, zeros": functools.partial(with_zeros, group=32),
    "int4 in 128, zeros": functools.partial(with_zeros, group=128),
}


@pytest.mark.parametrize("form", IN_GROUPS)
@pytest.mark.parametrize("target", slow_but([*GPUS, *TPUS], lambda x: x == TPUS[2]))
def test_weights_in_groups_compile(target, form):
    """Made whole on the way into the product: no weights in 16 bits in the device's memory."""
    mesh = mesh_of(target)
    rows = described(mesh, (256, EMBED), jnp.bfloat16)
    sizes = described(mesh, (EXPERTS,), jnp.int32)
    columns = 200 if target == GPUS[1] else MLP  # no block divides it: loads have masks
    shape = jax.ShapeDtypeStruct((EXPERTS, EMBED, columns), jnp.float32)
    weights = jax.tree.map(
        lambda x: described(mesh, x.shape, x.dtype),
        jax.eval_shape(IN_GROUPS[form], shape),
    )

    def layer(rows, gate, up, sizes):
        def local(rows, gate, up, sizes):
            return grouped_matmul(rows, gate, sizes), grouped_swiglu(rows, gate, up, sizes)

        return jax.shard_map(local, in_specs=(P(),) * 4, out_specs=(P(), P()))(
            rows, gate, up, sizes
        )

    report = compile_for(layer, (rows, weights, weights, sizes), mesh)
    assert report.kernels in (2, None)
    assert report.temp_bytes < EXPERTS * EMBED * MLP * 2, "of two matrices in 16 bits, half"


STACKS = {
    "bfloat16": lambda w: w.astype(jnp.bfloat16),
    "int8": jax.vmap(quantize),
    "float8 by block": jax.vmap(functools.partial(quantize, format="float8_e4m3fn", block=True)),
    "nvfp4": jax.vmap(functools.partial(quantize, format="nvfp4")),
    "mxfp4": jax.vmap(functools.partial(quantize, format="mxfp4")),
    "int4": jax.vmap(functools.partial(quantize, format="int4")),
}


@pytest.mark.parametrize(
    ("target", "form"),
    slow_but(
        itertools.product(("rtx-pro-6000:2", "v5p:2x2x1", "v6e:2x2"), STACKS),
        lambda case: case in [("rtx-pro-6000:2", "nvfp4"), ("v6e:2x2", "bfloat16")],
    ),
)
def test_a_scan_over_layers_copies_no_expert(target, form):
    """A slice in front of a kernel would copy all experts of a layer at every step."""
    mesh, layers, experts, embed, mlp = mesh_of(target), 4, 64, 2048, 1536

    def stack(*shape):
        shape = jax.ShapeDtypeStruct((layers, experts, *shape), jnp.float32)
        weights = jax.eval_shape(STACKS[form], shape)
        return jax.tree.map(lambda x: described(mesh, x.shape, x.dtype), weights)

    wide, back = stack(embed, mlp), stack(mlp, embed)
    rows = described(mesh, (16, embed), jnp.bfloat16)
    sizes = described(mesh, (layers, experts), jnp.int32)

    def run(in_place, rows, sizes, *weights):
        def layer(rows, step):
            index, sizes = step
            gate, up, down = weights
            if not in_place:
                gate, up, down = jax.tree.map(lambda x: x[index], weights)
                index = None
            hidden = grouped_swiglu(rows, gate, up, sizes, layer=index)
            return grouped_matmul(hidden, down, sizes, layer=index), None

        return jax.lax.scan(layer, rows, (jnp.arange(layers), sizes))[0]

    def temp_bytes(in_place):
        program = functools.partial(run, in_place)
        program = jax.shard_map(program, in_specs=(P(),) * 5, out_specs=P())
        report = compile_for(program, (rows, sizes, wide, wide, back), mesh)
        assert report.kernels in (2 * layers, None)
        return report.temp_bytes

    one_matrix = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(wide)) // layers
    # scales of blocks, which no kernel reads as they are, become 4 bytes for 128 weights; 12 rows
    # of int4's scales are no whole tiles, and v5p copies them for its kernel
    part = {"float8 by block": 8, "int4": 3}.get(form, 100)
    assert temp_bytes(in_place=True) < one_matrix / part
    assert temp_bytes(in_place=False) > one_matrix / 2
