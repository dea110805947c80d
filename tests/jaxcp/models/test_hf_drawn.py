# SPDX-License-Identifier: Apache-2.0
"""Dense models of drawn configurations compute what the transformers that is installed computes.

A draw is over every field that the reader accepts and that changes a result, and over the ways in
which files say it; `jaxcp.save` then says it again.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from slow import slow_but
from tiny_checkpoints import flat

import jaxcp

transformers = pytest.importorskip("transformers", reason="needs pip install jaxcp[hf]")
torch = pytest.importorskip("torch", reason="needs pip install jaxcp[hf]")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend

TOKENS, LENGTH = 48, 30
MESHES = {}, {"seq": 3}, {"seq": 2, "model": 2}
DRAWS = [(name, seed) for name in ("llama", "mistral", "qwen2", "qwen3") for seed in range(10)]


def rope_of(rng):
    """A `rope_parameters` of any kind that is known."""
    theta = {"rope_theta": float(rng.choice([500.0, 10_000.0, 1e6]))}
    slower = {"factor": float(rng.choice([2.0, 8.0])), "original_max_position_embeddings": 16}
    yarn = {"beta_fast": 8.0, "beta_slow": 1.0, "truncate": bool(rng.integers(2))}
    kind = rng.choice(["default", "linear", "llama3", "yarn"])
    more = {
        "default": {},
        "linear": {"factor": slower["factor"]},
        "llama3": slower | {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([2, 4]))},
        "yarn": slower | (yarn if rng.integers(2) else {"attention_factor": 1.25}),
    }[kind]
    return theta | {"rope_type": str(kind)} | more


def windows_of(rng, name, layers):
    window = int(rng.integers(1, LENGTH))
    if name == "llama":
        return {}
    if name == "mistral":
        return {"sliding_window": None if rng.integers(3) == 0 else window}
    fields = {"use_sliding_window": bool(rng.integers(4)), "sliding_window": window}
    fields["max_window_layers"] = int(rng.integers(0, layers + 2))
    if fields["use_sliding_window"] and rng.integers(2):
        kinds = "full_attention", "sliding_attention"
        fields["layer_types"] = [kinds[i] for i in rng.integers(0, 2, layers)]
    return fields


def drawn(name, seed):
    """Fields of a config.json, and a mesh."""
    rng = np.random.default_rng([seed, *name.encode()])
    layers, kv_heads = int(rng.integers(1, 5)), int(rng.choice([2, 4]))
    heads, head_dim = kv_heads * int(rng.integers(1, 4)), int(rng.choice([4, 8, 12]))
    fields = {
        "vocab_size": TOKENS, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "hidden_size": heads * head_dim, "hidden_act": "silu",
        "intermediate_size": int(rng.choice([32, 56])), "max_position_embeddings": 128,
        "rms_norm_eps": float(rng.choice([1e-6, 1e-3])), "rope_parameters": rope_of(rng),
        "tie_word_embeddings": bool(rng.integers(2)), "attention_dropout": 0.25,
        "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if rng.integers(2) or name == "qwen3":  # whose head_dim is 128 where there is none
        fields["head_dim"] = int(rng.choice([head_dim, 6, 16]))
    if name in ("llama", "qwen3"):
        fields["attention_bias"] = bool(rng.integers(2))
    if name == "llama":
        fields |= {"mlp_bias": bool(rng.integers(2)), "pretraining_tp": 2}
    fields |= windows_of(rng, name, layers)
    return fields, MESHES[rng.integers(len(MESHES))], bool(rng.integers(2))


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
    return model


def write_older(file, name, given):
    """A config.json of before `rope_parameters`, which says what was given and nothing else.

    What transformers saves has all that it works out: `layer_types`, of `max_window_layers`.
    """
    rope = dict(given["rope_parameters"])
    fields = {k: v for k, v in given.items() if k != "rope_parameters"}
    fields |= {"model_type": name, "torch_dtype": "float32", "rope_theta": rope.pop("rope_theta")}
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    file.write_text(json.dumps(fields))


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


@pytest.mark.parametrize(("name", "seed"), slow_but(DRAWS, lambda draw: draw[1] == 0))
def test_a_drawn_configuration_is_that_of_transformers(name, seed, mesh_of, tmp_path):
    fields, axes, is_old = drawn(name, seed)
    theirs = theirs_of(name, fields, seed)
    theirs.save_pretrained(tmp_path / "in")
    if is_old:
        write_older(tmp_path / "in" / "config.json", name, fields)
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

    if seed % 3 == 0:  # theirs bear the names of a checkpoint
        output.loss.backward()
        named = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
        save_file(named, tmp_path / "in" / "model.safetensors")
        wanted = flat(jaxcp.load(tmp_path / "in")[0])
        for path, x in flat(gradients(alone, jnp.asarray(tokens, jnp.int32))).items():
            limit = 1e-4 * np.abs(wanted[path]).max() + 1e-7
            np.testing.assert_allclose(x, wanted[path], atol=limit, rtol=0, err_msg=path)
    if axes:
        mesh_of(**axes)
        model, _ = jaxcp.load(tmp_path / "again")
        np.testing.assert_allclose(jaxcp.logits(model, tokens), expected, **close)
