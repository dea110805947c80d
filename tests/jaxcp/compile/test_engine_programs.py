# SPDX-License-Identifier: Apache-2.0
"""The programs of an engine, compiled for chips that are not there."""

import jax
import pytest
from flax import nnx

import jaxcp
from jaxcp.compile import compile_for, engine_programs, parse_target

CONFIG = jaxcp.HybridMoEConfig(
    vocab_size=1024, num_layers=2, embed_dim=256, num_heads=4, num_kv_heads=2, head_dim=128,
    mlp_dim=512, moe_dim=128, num_experts=4, num_experts_per_tok=2, layer_pattern="GL",
    window=1024, num_mtp_layers=1, dtype="bfloat16",
)  # fmt: skip


def programs(target, **options):
    mesh = parse_target(target).mesh(seq=4)
    return mesh, engine_programs(
        jaxcp.abstract_model(CONFIG), mesh, max_len=65_536, max_rows=4, pool_tokens=2**18, **options
    )


def test_the_programs_are_those_of_an_engine(mesh_of):
    """Their names and number agree, and an engine runs chunks of these sizes."""
    _, made = programs("v6e:2x2", drafts=2)
    assert list(made)[:2] == ["decode", "few"]
    mesh_of(seq=4)
    model = jaxcp.HybridMoE(CONFIG, rngs=nnx.Rngs(0))
    engine = jaxcp.Engine(model, None, max_len=65_536, max_rows=4, pool_tokens=2**18, drafts=2)
    rows, tokens, _ = engine.runner.together
    chunks = [f"chunk of {size}" for size in engine.runner.sizes]
    assert list(made)[2:] == [*chunks, f"{rows} chunks of {tokens}"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rtx-pro-6000:4", "v6e:2x2"])
def test_steps_read_and_write_the_pool_where_it_lies(target):
    """A step of decoding, and one with guesses and drafts, needs little beside the pool."""
    mesh, made = programs(target, drafts=2)
    pool = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made["decode"][1][1])) / 4
    for name in ("decode", "few"):
        report = compile_for(*made[name], mesh)
        assert report.argument_bytes > pool > 8 * report.temp_bytes, name
