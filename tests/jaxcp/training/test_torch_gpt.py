# SPDX-License-Identifier: Apache-2.0
"""Training beside PyTorch: the same weights and batches give the same losses and gradients."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxcp
from jaxcp.data.batch import checked
from jaxcp.data.placing import put
from jaxcp.layout import Zigzag
from jaxcp.mesh import MeshConfig
from jaxcp.training import OptimizerConfig, StartConfig, TextSource, TrainConfig
from jaxcp.training.step import init_state, join, make_step

torch = pytest.importorskip("torch", reason="needs pip install jaxcp[hf]")
torch_gpt = pytest.importorskip("benchmarks.torch_gpt")

STEPS, ROWS, LENGTH = 20, 6, 64
MODEL = jaxcp.GPTConfig(
    vocab_size=65, max_positions=LENGTH, num_layers=3, num_heads=4, embed_dim=48, activation="gelu"
)
SHAPE = torch_gpt.Shape(vocab_size=65, block_size=LENGTH, n_layer=3, n_head=4, n_embd=48)
DATA = TextSource(path="tinyshakespeare", alphabet="characters")
MESHES = [MeshConfig(), MeshConfig(data=2, seq=2)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A GPT-2 checkpoint with weights of every kind, norms and biases too."""
    folder = tmp_path_factory.mktemp("gpt")
    model = jaxcp.GPT(MODEL, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape).astype(x.dtype), model)
    jaxcp.save(jax.tree.map(lambda x, y: x + y, model, noise), folder)
    return folder


def run(weights, mesh, **changes):
    optimizer = {
        "learning_rate": 1e-3, "warmup_steps": 0, "decay_fraction": 0.0, "beta2": 0.99,
        "weight_decay": 0.1, "clip_norm": 1.0,
    }  # fmt: skip
    return TrainConfig(
        model=MODEL, seq_len=LENGTH, batch_size=ROWS, steps=STEPS, data=DATA, out_dir="nowhere",
        start=StartConfig(weights=str(weights)), optimizer=OptimizerConfig(**optimizer | changes),
        mesh=mesh,
    )  # fmt: skip


def host_batch(step):
    return checked(DATA.batch(step, ROWS, LENGTH), vocab_size=65)


def ours(config, steps):
    """The losses and the last state of a run."""
    mesh = config.mesh.make(jax.devices()[: config.mesh.size])
    step = make_step(config.model, None, config.optimizer, config.cycles, 1024, consecutive=True)
    losses = []
    with jax.set_mesh(mesh):
        state = init_state(config)
        for number in range(steps):
            state, record = step(state, put(host_batch(number), mesh=mesh, layout=Zigzag()))
            losses.append(float(record["loss"]))
    return losses, state


def as_torch(batch, *names):
    return [torch.from_numpy(batch[name].astype(np.int64)) for name in names]


@pytest.mark.parametrize("mesh", MESHES, ids=["one device", "data=2, seq=2"])
def test_twenty_steps_have_the_losses_of_pytorch(weights, mesh):
    losses, _ = ours(run(weights, mesh), STEPS)
    model = torch_gpt.GPT(SHAPE)
    torch_gpt.read(model, weights)
    optimizer = torch_gpt.adamw(model, rate=1e-3, betas=(0.9, 0.99), decay=0.1)
    theirs = [
        torch_gpt.advance(
            model, optimizer, *as_torch(host_batch(step), "tokens", "targets"), clip=1.0
        ).item()
        for step in range(STEPS)
    ]
    assert losses[-1] < losses[0] - 0.5
    np.testing.assert_allclose(losses, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mesh", MESHES, ids=["one device", "data=2, seq=2"])
def test_every_gradient_is_that_of_pytorch(weights, mesh, tmp_path):
    """The step's own, before anything is clipped; theirs in float64.

    A key's bias changes no probability: its gradient is 0, and both have rounding there.
    """
    config = run(weights, mesh, beta1=0.0, clip_norm=None)
    _, state = ours(config, 1)
    gradients = optax.tree.get(state["opt_state"], "mu")
    host = {name: jax.device_put(np.asarray(x)) for name, x in gradients.items()}
    others = {name: np.asarray(x) for name, x in state["others"].items()}
    jaxcp.save(join(config.model, {"params": host, "others": others}), tmp_path)
    found = torch_gpt.turned(load_file(tmp_path / "model.safetensors"))

    model = torch_gpt.GPT(SHAPE).double()
    torch_gpt.read(model, weights)
    model(*as_torch(host_batch(0), "tokens", "targets")).backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    expected["transformer.wte.weight"] = expected.pop(
        "lm_head.weight", expected.get("transformer.wte.weight")
    )
    assert found.keys() == expected.keys() and len(found) == 4 + 12 * SHAPE.n_layer
    for name, x in expected.items():
        if name.endswith("attn.c_attn.bias"):
            keys = slice(SHAPE.n_embd, 2 * SHAPE.n_embd)
            assert np.abs(found[name][keys]).max() < 1e-5 * np.abs(x).max()
            found[name], x = (np.delete(y, keys) for y in (found[name], x))
        distance = np.linalg.norm(found[name] - x) / np.linalg.norm(x)
        assert distance < 1e-5, (name, distance)


def test_a_planted_fault_is_seen(weights):
    """Losses of a model with another epsilon, or another decay, are not within the tolerance."""
    losses, _ = ours(run(weights, MeshConfig()), 5)
    other = dataclasses.replace(run(weights, MeshConfig(), beta2=0.98), steps=STEPS)
    assert np.abs(np.subtract(losses, ours(other, 5)[0])).max() > 1e-4
