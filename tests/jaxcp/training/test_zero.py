# SPDX-License-Identifier: Apache-2.0
"""States cut over data and seq: the numbers of one device, a layer gathered at a time."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcp
from jaxcp.compile import compile_for, parse_target
from jaxcp.compile.hlo import KINDS, transfers
from jaxcp.compile.report import on_mesh
from jaxcp.data.batch import checked
from jaxcp.data.lookahead import draft_batch
from jaxcp.data.placing import put
from jaxcp.layout import Zigzag
from jaxcp.mesh import MeshConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.models.hybrid_moe.config import HybridMoEConfig
from jaxcp.sharding import Rules, over_replicas
from jaxcp.training import LossConfig, OptimizerConfig, TextSource, TrainConfig, train
from jaxcp.training.overrides import override
from jaxcp.training.step import abstract_inputs, init_state, make_step

MESH = {"data": 2, "seq": 4, "model": 2, "expert": 1}
GPT = GPTConfig(vocab_size=64, max_positions=32, num_layers=3, num_heads=2, embed_dim=16)
HY3 = HybridMoEConfig(
    vocab_size=64, num_layers=4, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24,
    moe_dim=8, num_experts=4, num_experts_per_tok=2, num_mtp_layers=1,
)  # fmt: skip
ALL = LossConfig(balance_loss_weight=0.02, z_loss_weight=0.01, mtp_loss_weight=0.3)
# eps: where a gradient is 0 but for rounding, Adam's step would be +-1
SMOOTH = OptimizerConfig(learning_rate=0.05, warmup_steps=0, eps=0.1, clip_norm=0.5)


@pytest.mark.parametrize(
    ("spec", "shape", "stacked", "cut"),
    [
        (P(None, None), (8, 64), False, P(None, ("data", "seq"))),
        (P(None, "model"), (16, 16), False, P(("data", "seq"), "model")),
        (P(None, "model"), (3, 16), False, P(None, ("model", "data", "seq"))),
        (P(None, None), (64, 8), True, P(None, ("data", "seq"))),  # layers stay whole
        (P(None, None), (6, 4), False, P("data", "seq")),  # 8 divides neither
        (P(None,), (6,), False, P("data")),  # whole over seq
        (P(None,), (3,), False, P(None)),
        (P("seq", None), (8, 10), False, P("seq", "data")),  # experts lie there already
        (P(("data", "seq"),), (8,), False, P(("data", "seq"))),
        (P(), (), False, P()),
    ],
)  # fmt: skip
def test_an_array_is_cut_where_the_axes_divide_it(spec, shape, stacked, cut):
    assert over_replicas(spec, shape, MESH, stacked=stacked) == cut


def config(model, *, accumulate=1, mesh=None, zero=0, rules=None, muon=None):
    return TrainConfig(
        model=model, seq_len=21, batch_size=8, steps=4, data=TextSource(), out_dir="none",
        accumulate=accumulate, mesh=MeshConfig(**(mesh or {})), zero=zero, losses=ALL,
        rules=rules or Rules(), optimizer=dataclasses.replace(SMOOTH, muon_learning_rate=muon),
        strategy=jaxcp.Ring(),
    )  # fmt: skip


def batch_of(c, step):
    """Eight rows of 21 tokens, which no layout divides; one has no target, others few."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 64, (8, 21)).astype(np.int32)
    weights = (rng.random((8, 21)) < np.linspace(0, 1, 8)[:, None]).astype(np.float32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": weights}
    batch = checked(batch, vocab_size=64)
    return batch | draft_batch(batch, 1) if getattr(c.model, "num_mtp_layers", 0) else batch


def program(c):
    return make_step(
        c.model, c.strategy, c.optimizer, c.cycles, 32, losses=c.losses, zero=c.zero, rules=c.rules
    )


def two_steps(c):
    """The state, which has what the optimizer keeps of each gradient, and the records."""
    mesh = c.mesh.make(jax.devices()[: c.mesh.size])
    with jax.set_mesh(mesh):
        state, records = init_state(c), []
        before = {name: x.sharding for name, x in state["params"].items()}
        for step in range(2):
            batch = put(batch_of(c, step), mesh=mesh, layout=Zigzag(), accumulate=c.accumulate)
            state, record = program(c)(state, batch)
            records.append(record)
    assert {name: x.sharding for name, x in state["params"].items()} == before
    return jax.tree.map(np.asarray, (state, records))


alone = functools.cache(two_steps)


def same(c):
    one = dataclasses.replace(c, mesh=MeshConfig(), zero=0, rules=Rules())
    names = jax.tree_util.tree_leaves_with_path(alone(one))
    for (path, x), y in zip(names, jax.tree.leaves(two_steps(c)), strict=True):
        scale = max(1e-3, np.abs(x).max(initial=0)) if x.dtype.kind == "f" else 0
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(y, x, atol=2e-5 * scale, rtol=0, err_msg=name)


def test_parameters_in_parts_train_as_one_device():
    same(config(GPT, mesh={"data": 2, "seq": 2}, zero=3, accumulate=2))


def test_an_optimizer_in_parts_trains_as_one_device():
    same(config(GPT, mesh={"data": 2, "seq": 2}, zero=1, accumulate=2))


MESHES = [
    {"data": 2}, {"data": 4}, {"data": 2, "seq": 2}, {"seq": 4}, {"data": 2, "model": 2},
    {"data": 2, "expert": 2},
]  # fmt: skip
STAGES = [*((3, mesh) for mesh in MESHES), (1, MESHES[1]), (1, MESHES[5])]


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "mesh"), STAGES, ids=str)
def test_experts_drafts_and_routers_train_as_on_one_device(zero, mesh):
    same(config(HY3, mesh=mesh, zero=zero, accumulate=1 + ("seq" in mesh)))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[3:5], ids=str)
def test_dense_layers_train_as_on_one_device(mesh):
    same(config(GPT, mesh=mesh, zero=3))


@pytest.mark.slow
def test_experts_among_the_tokens_train_as_on_one_device():
    same(config(HY3, mesh={"data": 2, "seq": 2}, zero=3, accumulate=2, rules=Rules(experts="data")))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("axis", ["data", "seq", "model"])
def test_a_vocabulary_in_parts_trains_as_on_one_device(axis, zero):
    mesh = {"data": 2, "seq": 2, "model": 2}
    same(config(GPT, mesh=mesh, zero=zero, rules=Rules(vocab=axis)))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("mesh", [{"seq": 4}, *MESHES[2:3], *MESHES[4:]], ids=str)
def test_muon_sees_whole_matrices(mesh, zero):
    same(config(HY3, mesh=mesh, zero=zero, muon=0.02))


def test_muon_sends_parts_of_matrices_twice():
    """No device gathers a stack of matrices: parts are exchanged, results dealt back."""
    c = config(WIDE, zero=3, mesh={"data": 8}, muon=0.02)
    c = dataclasses.replace(c, seq_len=8)
    mesh = c.mesh.make()
    inputs = abstract_inputs(c, mesh)
    found = transfers(text_of(inputs, mesh, program(c)))
    # 18 matrices of q, k and v are dealt as 24; 6 of o, and 6 and 6 of four times the size, as 8
    hands = 4 * 64 * 64 * (24 + 8 + 4 * (8 + 8)) // 8
    dealt = [x for x in found if x.kind == "all-to-all"]
    assert sum(x.bytes * x.count for x in dealt) == 2 * hands
    stack = WIDE.num_layers * 4 * 64 * 64
    assert all(x.bytes < stack for x in found if x.kind == "all-gather")


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["attention_saveable", "dots_saveable"])
def test_what_is_saved_changes_nothing(remat):
    same(config(dataclasses.replace(GPT, remat=remat), mesh={"data": 2, "seq": 2}, zero=3))


def part(c, name, shape):
    """Count the bytes of a float32 array that a device holds, from sizes alone."""
    cut = c.mesh.data * c.mesh.seq
    fits = any(size % cut == 0 for size in shape[name.startswith("layers.") :])
    return 4 * math.prod(shape) // (cut if fits else 1)


WIDE = GPTConfig(
    vocab_size=64, max_positions=64, num_layers=6, num_heads=4, embed_dim=64, remat=True
)


def compiled(target, model=WIDE, zero=3, **axes):
    c = dataclasses.replace(config(model, zero=zero, mesh=axes), seq_len=8)
    mesh = c.mesh.make() if target is None else parse_target(target).mesh(**axes)
    inputs = abstract_inputs(c, mesh)
    return c, inputs, mesh, program(c)


def text_of(inputs, mesh, step):
    with jax.set_mesh(mesh):
        return step.lower(*inputs).compile().as_text()


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_device_holds_its_part(zero):
    c, inputs, mesh, step = compiled(None, zero=zero, data=8)
    report = compile_for(step, inputs, mesh)
    shapes = {name: x.shape for name, x in inputs[0]["params"].items()}
    whole = sum(4 * math.prod(shape) for shape in shapes.values())
    parts = sum(part(c, name, shape) for name, shape in shapes.items())
    state = {0: 3 * whole, 1: whole + 2 * parts, 3: 3 * parts}[zero]
    assert parts < whole / 7.9
    tokens = 4 * 8 * 4 // 1  # tokens, targets, positions, weights of one row of 8
    rest = report.argument_bytes - state - tokens
    assert 0 <= rest <= 256  # counts of steps and a key


def test_a_layer_is_gathered_at_a_time():
    """Of each weight of a stack one layer, once forward and once backward; never the stack."""
    _, inputs, mesh, step = compiled(None, data=8)
    gathers = [x for x in transfers(text_of(inputs, mesh, step)) if x.kind == "all-gather"]
    layers = WIDE.num_layers
    in_loops = [x for x in gathers if x.count == layers]
    assert sum(x.bytes for x in in_loops) >= 2 * 4 * 12 * 64 * 64
    stack = layers * 4 * 64 * 64  # the smallest matrices of all layers
    assert all(x.bytes < stack for x in gathers)


@pytest.mark.slow
def test_another_stage_goes_on(tmp_path):
    """A checkpoint of one stage and mesh resumes on others; a model in parts gathers itself."""
    c = dataclasses.replace(
        config(GPT, mesh={"data": 2}, zero=3), data=TextSource(), seq_len=24, out_dir=tmp_path,
        model=dataclasses.replace(GPT, vocab_size=256), losses=LossConfig(), log_every=1,
    )  # fmt: skip
    straight = train(dataclasses.replace(c, out_dir=tmp_path / "straight", zero=0))
    first = train(dataclasses.replace(c, stop_after=2))
    tokens = np.arange(48).reshape(2, 24) % 7
    with jax.set_mesh(c.mesh.make(jax.devices()[:2])):
        given = jaxcp.logits(first.model, tokens)
    whole = train(dataclasses.replace(c, zero=1, stop_after=2, mesh=MeshConfig()))
    with jax.set_mesh(whole.model.embed.get_value().sharding.mesh):
        np.testing.assert_allclose(given, jaxcp.logits(whole.model, tokens), atol=1e-5)
    last = train(dataclasses.replace(c, zero=1, mesh=MeshConfig(seq=2)))
    assert last.resumed_from == 2
    np.testing.assert_allclose(last.final_loss, straight.final_loss, rtol=1e-5)


def test_stages_are_read_and_checked():
    assert override(config(GPT), ["zero=3"]).zero == 3
    with pytest.raises(ValueError, match=r"zero must be 0, 1 or 3.*zero=2"):
        config(GPT, zero=2)


@pytest.mark.slow
def test_a_tpu_scatters_the_gradient_of_a_layer():
    """Each device gets its part of the sum, inside the loop over layers."""
    _, inputs, mesh, step = compiled("v5e:2x4", data=8)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = step.trace(*on_mesh(inputs, mesh)).lower(lowering_platforms=("tpu",))
    found = [x for x in transfers(lowered.compile().as_text()) if x.count == WIDE.num_layers]
    bytes_of = {kind: sum(x.bytes for x in found if x.kind == kind) for kind in KINDS}
    layer = 4 * 12 * 64 * 64
    assert bytes_of["all-gather"] >= 2 * layer and bytes_of["reduce-scatter"] >= layer
    assert bytes_of["all-reduce"] < layer / 10  # vectors, which take part in no product
