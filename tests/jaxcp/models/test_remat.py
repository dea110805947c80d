# SPDX-License-Identifier: Apache-2.0
"""Policies of recomputation by name."""

import dataclasses

import jax
import pytest
from slow import slow_but
from strategies import VARIANTS

from jaxcp.compile import parse_target
from jaxcp.compile.report import on_mesh
from jaxcp.context_parallel import FixedOrder, Halo, Ring
from jaxcp.layers.remat import POLICIES
from jaxcp.mesh import MeshConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import TextSource, TrainConfig
from jaxcp.training.overrides import override
from jaxcp.training.step import abstract_inputs, make_step

RING = Ring()
CALL, COMPILED = "tpu_custom_call", 'custom_call_target="tpu_custom_call"'
# FixedOrder has no Mosaic kernels to count: it scans over pieces; Halo needs windows
KERNELS = [strategy for strategy in VARIANTS if not isinstance(strategy, FixedOrder | Halo)]
GPT = GPTConfig(
    vocab_size=128, max_positions=512, num_layers=2, num_heads=4, embed_dim=256, dtype="bfloat16"
)


def run(remat, strategy=RING):
    return TrainConfig(
        model=dataclasses.replace(GPT, remat=remat), seq_len=512, batch_size=2, steps=1,
        data=TextSource(), out_dir="none", strategy=strategy, 
        mesh=MeshConfig(data=2, seq=2),
    )  # fmt: skip


def lowered(remat, strategy):
    """The program of a step for four chips."""
    config = run(remat, strategy)
    step = make_step(config.model, config.strategy, config.optimizer, config.steps, 512)
    mesh = parse_target("v6e:2x2").mesh(data=2, seq=2)
    inputs = on_mesh(abstract_inputs(config, mesh), mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.trace(*inputs).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("strategy", slow_but(KERNELS, lambda s: s == RING), ids=repr)
def test_with_its_results_saved_attention_runs_once(strategy):
    """Count its kernels, a loop's body once: as many as where all is saved."""
    every, none, saved = (lowered(x, strategy) for x in (False, True, "attention_saveable"))
    count = every.as_text().count(CALL)
    assert 0 < count < none.as_text().count(CALL)
    if saved.as_text().count(CALL) != count:  # what nobody needs goes when it is compiled
        assert saved.compile().as_text().count(COMPILED) == count


def test_a_policy_is_named():
    for name in POLICIES:
        assert override(run(False), [f"model.remat={name}"]).model.remat == name
    assert override(run(False), ["model.remat=true"]).model.remat is True
    with pytest.raises(ValueError, match=r"nothing_saveable.*got remat='attention'"):
        run("attention")
