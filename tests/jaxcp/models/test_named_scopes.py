# SPDX-License-Identifier: Apache-2.0
"""A trace reads like the code: operations of compiled programs are named by phase and layer."""

import functools
import re

import jax
import pytest

import jaxcp
from jaxcp.compile import decode_program, prefill_program
from jaxcp.mesh import MeshConfig
from jaxcp.models.hybrid_moe.config import HybridMoEConfig
from jaxcp.sharding import Rules
from jaxcp.training import TextSource, TrainConfig
from jaxcp.training.step import abstract_inputs, make_step

SHARDS = 2
CONFIG = HybridMoEConfig(
    vocab_size=256, num_layers=3, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
    mlp_dim=16, moe_dim=8, num_experts=4, num_experts_per_tok=2, num_mtp_layers=1,
)  # fmt: skip
LAYER = [
    "attention/qkv/norm", "attention/attend", "attention/output",
    "norm", "moe/route", "moe/exchange/experts", "moe/combine", "moe/mlp",
]  # fmt: skip
STACK = [f"layers.1:3/{phase}" for phase in LAYER]


def mesh():
    return MeshConfig(seq=SHARDS).make(jax.devices()[:SHARDS])


def scopes(program):
    """The path of every operation: scopes, and what transformations and loops put between them."""
    return set(re.findall(r'op_name="([^"]+)"', program.compile().as_text()))


@functools.cache
def training():
    run = TrainConfig(
        model=CONFIG, mesh=MeshConfig(seq=SHARDS), rules=Rules(experts="seq"), seq_len=16,
        batch_size=1, steps=2, data=TextSource(), out_dir="unused",
    )  # fmt: skip
    step = make_step(CONFIG, run.strategy, run.optimizer, run.steps, run.loss_chunk)
    with jax.set_mesh(mesh()):
        return scopes(step.lower(*abstract_inputs(run, mesh())))


@functools.cache
def inference(name):
    made = {
        "prefill": functools.partial(prefill_program, tokens=64, rules=Rules(experts="seq")),
        "decode": functools.partial(decode_program, max_len=64),
    }
    with jax.set_mesh(mesh()):
        program, arguments = made[name](jaxcp.abstract_model(CONFIG), mesh())
        return scopes(program.lower(*arguments))


def missing(phases, names):
    """Phases, `outer/inner`, that no operation is in; other parts of a path may come between."""
    return [phase for phase in phases if not any(re.search(_path(phase), name) for name in names)]


def _path(phase):
    return r"\b.*/.*\b".join(re.escape(part) + r"(?![\w.:])" for part in phase.split("/"))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["jvp", "transpose"])
def test_a_training_step_reads_like_the_code(direction):
    phases = [
        *STACK,
        "layers.0/attention/attend",
        "layers.0/mlp",
        "embed",
        "loss/head",
        "mtp/embed",
    ]
    names = {name for name in training() if direction in name}
    assert not missing(phases, names)
    assert not missing(["optimizer", "balance"], training())


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_inference_reads_like_the_code(name):
    phases = ["embed", "head", "layers.0/mlp", *STACK]
    if name == "decode":
        phases.remove("layers.1:3/moe/combine")  # of one token: XLA makes it anew, without a name
        phases = [phase.replace("exchange", "dispatch") for phase in phases]
    assert not missing([f"{name}/{phase}" for phase in phases], inference(name))
