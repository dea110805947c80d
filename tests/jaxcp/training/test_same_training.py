# SPDX-License-Identifier: Apache-2.0
"""A step of training is the same on every mesh: each loss, metric, gradient and balancing bias.

Drawn are what a mesh, a strategy and pieces make of a batch: every value of each, or with
JAXCP_ALL_PAIRS=1 every two that meet; a program that is compiled once then takes every kind of
batch. AdamW without beta1 keeps the gradient itself, so it
is the step's own that is compared: Muon's would hide a wrong scale.
"""

import dataclasses
import os

import jax
import numpy as np
import optax
import pytest
from pairwise import each_value, pairwise

import jaxcp
from jaxcp import USP, AllGather, Balanced, Contiguous, Ring, RingPassQ, Striped, Ulysses
from jaxcp.context_parallel import FixedOrder
from jaxcp.data.batch import checked, consecutive
from jaxcp.data.lookahead import draft_batch
from jaxcp.data.placing import put
from jaxcp.layout import Zigzag
from jaxcp.mesh import MeshConfig
from jaxcp.models.hybrid_moe.config import HybridMoEConfig
from jaxcp.training import LossConfig, OptimizerConfig, TrainConfig
from jaxcp.training.step import init_state, make_step

ROWS, LENGTH, DEPTH = 8, 48, 2
GRADIENT = 3e-5
"""Float32, of the greatest entry of a leaf."""
MIXTURE = HybridMoEConfig(
    vocab_size=61, num_layers=3, embed_dim=16, num_heads=8, num_kv_heads=8, head_dim=4,
    mlp_dim=24, moe_dim=8, num_experts=4, num_experts_per_tok=2, num_mtp_layers=1,
    layer_pattern="GLN", window=9,
)  # fmt: skip
DENSE = jaxcp.GPTConfig(
    vocab_size=61, max_positions=LENGTH, num_layers=2, num_heads=8, embed_dim=32
)
LOSSES = LossConfig(balance_loss_weight=0.02, z_loss_weight=0.01, mtp_loss_weight=0.3)
OPTIMIZER = OptimizerConfig(beta1=0.0, clip_norm=None, warmup_steps=0)
STRATEGIES = (
    Ring(),
    Ring(bidirectional=True, layout=Striped()),
    Ring(layout=Balanced(2)),
    RingPassQ(layout=Contiguous()),
    AllGather(chunks=2),
    Ulysses(),
    USP(ulysses=2),
    FixedOrder(),
)
MESHES = (
    MeshConfig(seq=2),
    MeshConfig(seq=4),
    MeshConfig(seq=5),  # which pads rows
    MeshConfig(seq=8),
    MeshConfig(data=2, seq=4),
    MeshConfig(seq=2, model=2),
    MeshConfig(seq=2, expert=2),
    MeshConfig(data=2, seq=2, model=2),
    MeshConfig(data=8),
)


def possible(case):
    strategy, mesh = case["strategy"], case["mesh"]
    return not (
        (isinstance(strategy, USP) and mesh.seq % 2)
        or (isinstance(strategy, Ulysses | FixedOrder) and mesh.seq == 5)  # of 8 heads, 16 pieces
        or ROWS // case["accumulate"] % mesh.data
        or (case["model"] is DENSE and mesh.expert > 1)
    )


PAIRS = pairwise(
    {
        "mesh": MESHES,
        "strategy": STRATEGIES,
        "accumulate": (1, 4),
        "model": (MIXTURE, DENSE),
        "ordered": (False, True),  # then window layers exchange the window alone
    },
    possible,
)
SOME = each_value(PAIRS)
SOME += [next(case for case in PAIRS if case["accumulate"] == 4 and case["model"] is MIXTURE)]
CASES = PAIRS if "JAXCP_ALL_PAIRS" in os.environ else SOME
QUICK = next(case for case in CASES if case["model"] is DENSE and case["mesh"].data == 1)


def random_batch(rng, *, ordered):
    """Documents that end anywhere, rows of pads, weights of all sizes; `ordered`: one a row."""
    tokens = rng.integers(0, 61, (ROWS, LENGTH)).astype(np.int32)
    targets = np.roll(tokens, -1, 1)
    starts = rng.random((ROWS, LENGTH)) < (0 if ordered else 0.1)
    segments = np.cumsum(starts, 1).astype(np.int32)
    first = np.maximum.accumulate(np.where(starts, np.arange(LENGTH), 0), axis=1)
    weights = rng.choice(np.float32([0, 0.25, 1, 3]), (ROWS, LENGTH))
    targets[:, -1] = -1
    targets[:, :-1][segments[:, 1:] != segments[:, :-1]] = -1
    batch = {"tokens": tokens, "targets": targets, "weights": weights, "segment_ids": segments}
    return batch | {"positions": (np.arange(LENGTH) - first).astype(np.int32)}


def one_valid(batch, rng):
    row, place = rng.integers(ROWS), rng.integers(LENGTH - 1)
    batch["targets"][row, place] = 7
    batch["weights"] = np.zeros_like(batch["weights"])
    batch["weights"][row, place] = 2


def no_shard(batch, layout, shards):
    """Nothing of the last shard's tokens is learnt."""
    index = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    there = layout.permute(batch | {"targets": index}, shards)["targets"]
    last = there[:, there.shape[1] // shards * (shards - 1) :]
    for row, places in enumerate(last):
        batch["weights"][row, places[places >= 0]] = 0


def batches(layout, shards, *, ordered):
    """Host batches by what is special about them."""
    rng = np.random.default_rng(shards)
    made = {name: random_batch(rng, ordered=ordered) for name in ("any", "one", "shard", "none")}
    one_valid(made["one"], rng)
    if shards > 1:
        no_shard(made["shard"], layout, shards)
    made["none"]["weights"][:] = 0
    return {name: checked(batch, vocab_size=61) for name, batch in made.items()}


def losses_of(model, accumulate):
    """Losses that pieces do not change: balance is that of a piece's own tokens."""
    if model is DENSE:
        return LossConfig()
    return LOSSES if accumulate == 1 else dataclasses.replace(LOSSES, balance_loss_weight=0.0)


def config_of(model, strategy, mesh, accumulate, losses):
    return TrainConfig(
        model=model, strategy=strategy, mesh=mesh, accumulate=accumulate, losses=losses,
        optimizer=OPTIMIZER, seq_len=LENGTH, batch_size=ROWS, steps=10, out_dir="nowhere",
        data=jaxcp.training.TextSource(),
    )  # fmt: skip


def steps_of(config, hosts):
    """`(gradients, record, others)` after one step on each of the host batches."""
    mesh = config.mesh.make(jax.devices()[: config.mesh.size])
    layout = getattr(config.strategy, "layout", Zigzag())
    found = {}
    with jax.set_mesh(mesh):
        for name, host in hosts.items():
            in_order = consecutive(host) and not layout.by_segment
            step = make_step(
                config.model, config.strategy, config.optimizer, config.cycles, 16,
                consecutive=in_order, losses=config.losses,
            )  # fmt: skip
            if config.model is MIXTURE:
                host = host | draft_batch(host, DEPTH)
            batch = put(host, mesh=mesh, layout=layout, accumulate=config.accumulate)
            state, record = step(init_state(config), batch)
            gradients = optax.tree.get(state["opt_state"], "mu")
            found[name] = jax.tree.map(np.asarray, (gradients, record, state["others"]))
    return found


def assert_same(found, expected):
    for name, (gradients, record, others) in found.items():
        wanted, wanted_record, wanted_others = expected[name]
        greatest = max(np.abs(x).max() for x in wanted.values())
        assert (greatest == 0) == (name == "none"), "a batch that teaches nothing, or one that does"
        for leaf, x in wanted.items():
            bound = GRADIENT * np.abs(x).max() + 1e-7 * greatest
            np.testing.assert_allclose(gradients[leaf], x, rtol=0, atol=bound, err_msg=leaf)
        assert record.keys() == wanted_record.keys()
        for part, x in wanted_record.items():
            np.testing.assert_allclose(record[part], x, rtol=2e-5, atol=1e-6, err_msg=part)
        for leaf, x in wanted_others.items():
            np.testing.assert_array_equal(others[leaf], x, err_msg=leaf)


def name_of(case):
    mesh = "".join(f"{k}{v}" for k, v in dataclasses.asdict(case["mesh"]).items() if v > 1)
    strategy = case["strategy"]
    layout = type(getattr(strategy, "layout", None)).__name__
    family = "dense" if case["model"] is DENSE else "mixture"
    parts = mesh, type(strategy).__name__, layout, case["accumulate"], family, case["ordered"]
    return "-".join(map(str, parts))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name_of(case), marks=() if case is QUICK else pytest.mark.slow)
        for case in CASES
    ],
)
def test_a_step_is_that_of_one_device(case):
    model, strategy, mesh, ordered = (case[k] for k in ("model", "strategy", "mesh", "ordered"))
    hosts = batches(getattr(strategy, "layout", Zigzag()), mesh.seq, ordered=ordered)
    losses = losses_of(model, case["accumulate"])
    alone = steps_of(config_of(model, Ring(), MeshConfig(), 1, losses), hosts)
    found = steps_of(config_of(model, strategy, mesh, case["accumulate"], losses), hosts)
    assert_same(found, alone)
