# SPDX-License-Identifier: Apache-2.0
"""Quantized weights are never whole in memory in another format: what a chip's compiler allots for
a model's step, with no chip here, has no room for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pairwise import pairwise
from published import HY3

import jaxcp
from jaxcp.compile import compile_for, decode_program, parse_target, prefill_program
from jaxcp.layers.quantized import is_quantized, quantized_model
from jaxcp.models import config_from_dict
from pallas_kernels import Quantized, dequantize

# jax 0.11 and later warn when Pallas-Triton is used; it works through 0.12.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
FORMATS = {
    "int8": {"format": jnp.int8},
    "fp8": {"format": jnp.float8_e4m3fn},
    "fp8_block": {"format": jnp.float8_e4m3fn, "block": True},
    "mxfp8": {"format": "mxfp8"},
    "mxfp4": {"format": "mxfp4"},
    "nvfp4": {"format": "nvfp4"},
    "int4": {"format": "int4"},
}
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 1024, "moe_intermediate_size": 512,
    "expert_hidden_dim": 512, "intermediate_size": 2048, "num_experts": 64,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 1024,
    "num_nextn_predict_layers": 0,
}  # fmt: skip


def abstract(how):
    """Hy3, smaller, in bfloat16; with shapes in the place of arrays."""
    model = jaxcp.abstract_model(config_from_dict(HY3 | SIZES | {"dtype": "bfloat16"}))

    def stored(leaf):
        if not isinstance(leaf, nnx.Param):
            return leaf
        return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16))

    model = jax.tree.map(stored, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return jax.eval_shape(lambda model: quantized_model(model, **how), model)


def widened_bytes(model):
    """Bytes of the quantized weights, were they bfloat16."""
    leaves = jax.tree.leaves(model, is_leaf=is_quantized)
    return sum(2 * int(np.prod(x.shape)) for x in leaves if is_quantized(x))


def compiled(model, where, program, change=None):
    """A step of `model`, or of what `change` makes of it inside the program."""
    target = parse_target(where)
    mesh = target.mesh(seq=target.size)
    if program == "prefill":
        fn, args = prefill_program(model, mesh, tokens=256)
    else:
        fn, args = decode_program(model, mesh, max_len=256)
    if change is None:  # a prefill has arguments that are static, and stay so
        return compile_for(fn, args, mesh)
    return compile_for(lambda model, *rest: fn(change(model), *rest), args, mesh)


QUICK = [("nvfp4", "v6e:2x2", "decode")]
EVERY = [
    tuple(case.values())
    for case in pairwise(
        {"name": FORMATS, "where": ("v6e:2x2", "h200:2"), "program": ("prefill", "decode")}
    )
]
SLOW = [pytest.param(*x, marks=pytest.mark.slow) for x in EVERY if x not in QUICK]


@pytest.mark.parametrize("name, where, program", [*QUICK, *SLOW])
def test_nothing_is_widened_in_memory(name, where, program):
    model = abstract(FORMATS[name])
    report, wide = compiled(model, where, program), widened_bytes(model)
    assert wide > 200e6
    bits = 4 if name in ("mxfp4", "nvfp4", "int4") else 8
    assert report.argument_bytes < wide * (bits + 1) / 16, "of which 16 MB are plain weights"
    assert report.temp_bytes < wide / 16


@pytest.mark.slow
def test_what_is_widened_would_show():
    def of_experts(x):
        return dequantize(x, jnp.bfloat16) if isinstance(x, Quantized) else x

    model = abstract(FORMATS["fp8"])
    report = compiled(
        model, "v6e:2x2", "decode", lambda x: jax.tree.map(of_experts, x, is_leaf=is_quantized)
    )
    assert report.temp_bytes > widened_bytes(model) / 4, "one matrix of all experts at a time"
