# SPDX-License-Identifier: Apache-2.0
"""Models of drawn configurations compute what the transformers that is installed computes.

A draw is over every field that the reader accepts and that changes a result, and over the ways in
which files say it (`tests/drawn_configs.py`); `jaxcp.save` then says it again.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_configs import FAMILIES, LENGTH, TOKENS, drawn, one_of
from flax import nnx
from safetensors.numpy import load_file, save_file
from slow import slow_but
from tiny_checkpoints import flat

import jaxcp

transformers = pytest.importorskip("transformers", reason="needs pip install jaxcp[hf]")
torch = pytest.importorskip("torch", reason="needs pip install jaxcp[hf]")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend

MESHES = {}, {"seq": 3}, {"seq": 2, "model": 2}, {"seq": 2, "expert": 2}
DRAWS = [(name, seed) for name in FAMILIES for seed in range(40)]
QUICK = dict.fromkeys(FAMILIES, 0) | {"glm4_moe": 8, "minimax_m2": 34, "mimo_v2_flash": 8}
"""A draw of each family: of mixtures small ones, on one device, in groups and in older words."""


def theirs_of(name, fields, seed):
    """A model of transformers whose every parameter is random."""
    config = transformers.models.auto.CONFIG_MAPPING[name](**fields, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.float().eval().parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            near = 1.0 if parameter.ndim == 1 else 0.0  # norms; biases of 1 are as good as any
            parameter.copy_(near + noise * parameter.shape[-1] ** -0.5)
        for bias in selection_biases(model).values():
            bias.copy_(0.2 * torch.randn(bias.shape, generator=generator))
    return model


def selection_biases(model):
    return {k: b for k, b in model.named_buffers() if k.endswith("e_score_correction_bias")}


@jax.jit
def gradients(model, tokens):
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def loss(parameters):
        logits = nnx.merge(graph, parameters, rest)(tokens, positions)[:, :-1]
        right = tokens[:, 1:, None] == jnp.arange(logits.shape[-1])
        picked = jnp.where(right, jax.nn.log_softmax(logits), 0.0).sum()
        return -picked / jnp.float32(tokens[:, 1:].size)

    return nnx.merge(graph, jax.grad(loss)(parameters), rest)


def assert_gradients(ours, theirs, output, tokens, folder):
    """Theirs bear the names of a checkpoint, in memory."""
    output.loss.backward()
    named = {k: p.grad.numpy() for k, p in theirs.named_parameters() if p.grad is not None}
    named |= {k: np.zeros(b.shape, np.float32) for k, b in selection_biases(theirs).items()}
    save_file(named, folder / "model.safetensors")
    wanted = flat(jaxcp.load(folder)[0])
    for path, x in flat(gradients(ours, jnp.asarray(tokens, jnp.int32))).items():
        if not path.endswith("router_bias"):  # moved by load
            limit = 1e-4 * np.abs(wanted[path]).max() + 1e-7
            np.testing.assert_allclose(x, wanted[path], atol=limit, rtol=0, err_msg=path)


@pytest.mark.parametrize(("name", "seed"), slow_but(DRAWS, lambda draw: draw[1] == QUICK[draw[0]]))
def test_a_drawn_configuration_is_that_of_transformers(name, seed, mesh_of, tmp_path):
    rng = np.random.default_rng([seed, *name.encode()])
    fields, older = drawn(name, rng)
    axes, is_old = one_of(rng, *MESHES), rng.integers(2)
    theirs = theirs_of(name, fields, seed)
    theirs.save_pretrained(tmp_path / "in")
    if is_old:
        said = older | {"model_type": name, "torch_dtype": "float32"}
        (tmp_path / "in" / "config.json").write_text(json.dumps(said))
    tokens = np.random.default_rng(seed).integers(0, TOKENS, (2, LENGTH))
    output = theirs(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(tokens))
    expected = output.logits.detach().numpy()
    close = {"atol": 1e-4 * np.abs(expected).max(), "rtol": 0}

    alone, _ = jaxcp.load(tmp_path / "in")
    np.testing.assert_allclose(jaxcp.logits(alone, tokens), expected, **close, err_msg=str(fields))
    jaxcp.save(alone, tmp_path / "again")
    assert jaxcp.load_config(tmp_path / "again") == alone.config
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("in", "again"))
    assert before.keys() == after.keys()
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        found = again.eval()(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(found, expected, **close)

    if seed % 3 == 0:
        assert_gradients(alone, theirs, output, tokens, tmp_path / "in")
    if axes and ("expert" not in axes or hasattr(alone.config, "num_experts")):
        mesh_of(**axes)
        model, _ = jaxcp.load(tmp_path / "again")
        np.testing.assert_allclose(jaxcp.logits(model, tokens), expected, **close)
