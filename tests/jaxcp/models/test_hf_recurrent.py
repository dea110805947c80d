# SPDX-License-Identifier: Apache-2.0
"""Recurrent models of drawn configurations compute what the installed transformers computes.

A draw is over every field that the reader accepts and that changes a result; `jaxcp.save` then says
it again, and gradients are compared too. What is expected is computed in float64: logits may be
1e-4 of the largest from it, gradients 5e-4, or as much as those of transformers in float32 are.
"""

import contextlib
import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from slow import slow_but
from tiny_checkpoints import FIXTURES, flat

import jaxcp
from jaxcp.models.base import embed

transformers = pytest.importorskip("transformers", reason="needs pip install jaxcp[hf]")
torch = pytest.importorskip("torch", reason="needs pip install jaxcp[hf]")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend

TOKENS, LENGTH = 48, 70
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
MESHES = {}, {"seq": 3}, {"seq": 4}, {"seq": 2, "model": 2}
NAMES = "qwen3_next", "qwen3_5_moe_text", "qwen3_5_text", "kimi_linear"
DRAWS = [(name, seed) for name in NAMES for seed in range(10)]
PARTS = {("qwen3_next", 4): 2e-4}
"""Bounds, as parts of the largest logit, where it is not 1e-4. In this draw two layers in a row
multiply what came before by a hundred and by twenty at a token, whichever program computes them:
see `test_each_layer_of_what_came_before_is_that_of_float64`."""


def kinds_of(rng, layers):
    kinds = "linear_attention", "full_attention"
    return [kinds[i] for i in rng.integers(0, 2, layers)]


def experts_of(rng):
    count = int(rng.choice([4, 6]))
    return count, int(rng.integers(1, count)), int(rng.choice([8, 24]))


def qwen_of(rng, name, layers):
    kv_heads, key_heads = int(rng.choice([2, 4])), 2 * int(rng.integers(1, 3))
    fields = {
        "num_attention_heads": kv_heads * int(rng.integers(1, 3)), "num_key_value_heads": kv_heads,
        "head_dim": int(rng.choice([8, 16])), "rms_norm_eps": float(rng.choice([1e-6, 1e-3])),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * int(rng.integers(1, 4)),
        "linear_key_head_dim": int(rng.choice([4, 8])),
        "linear_value_head_dim": int(rng.choice([4, 12])),
        "linear_conv_kernel_dim": int(rng.integers(2, 6)),
        "attention_bias": bool(rng.integers(2)), "intermediate_size": 40,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": float(rng.choice([500.0, 1e6])),
            "partial_rotary_factor": float(rng.choice([0.25, 0.5, 1.0])),
        },
    }  # fmt: skip
    if name != "qwen3_5_text":
        count, per_tok, width = experts_of(rng)
        fields |= {
            "num_experts": count, "num_experts_per_tok": per_tok, "moe_intermediate_size": width,
            "shared_expert_intermediate_size": int(rng.choice([16, 32])),
        }  # fmt: skip
    if name == "qwen3_next":
        fields |= {
            "norm_topk_prob": bool(rng.integers(2)), "decoder_sparse_step": int(rng.integers(1, 3)),
            "mlp_only_layers": [int(rng.integers(layers))] * int(rng.integers(2)),
        }  # fmt: skip
    else:
        fields["rope_parameters"] |= {"mrope_section": [1, 1, 1], "mrope_interleaved": True}
    return fields


def kimi_of(rng, layers):
    """No tied head: transformers has two matrices then, which the reader refuses."""
    heads, (count, per_tok, width) = int(rng.choice([2, 4])), experts_of(rng)
    dense = int(rng.integers(0, layers + 1))
    return {
        "tie_word_embeddings": False,
        "num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": 40,
        "q_lora_rank": [None, 12][rng.integers(2)], "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": int(rng.choice([4, 8])), "v_head_dim": int(rng.choice([4, 12])),
        "linear_head_dim": int(rng.choice([4, 8])), "linear_num_heads": 2 * int(rng.integers(1, 3)),
        "linear_conv_kernel_dim": int(rng.integers(2, 6)), "n_shared_experts": 1,
        "num_local_experts": count, "num_experts_per_tok": per_tok, "moe_intermediate_size": width,
        "n_group": 2, "topk_group": 2, "norm_topk_prob": bool(rng.integers(2)),
        "routed_scaling_factor": float(rng.choice([1.0, 2.5])),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-3])),
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
    }  # fmt: skip


def drawn(name, seed):
    """Fields of a config.json, and a mesh."""
    rng = np.random.default_rng([seed, *name.encode()])
    layers = int(rng.integers(1, 5))
    fields = {
        "vocab_size": TOKENS, "num_hidden_layers": layers, "hidden_size": 32, "hidden_act": "silu",
        "layer_types": kinds_of(rng, layers), "tie_word_embeddings": bool(rng.integers(2)),
        "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    fields |= kimi_of(rng, layers) if name == "kimi_linear" else qwen_of(rng, name, layers)
    return fields, MESHES[rng.integers(len(MESHES))]


def theirs_of(name, fields, seed):
    """A model of transformers whose every parameter is random."""
    config = transformers.models.auto.CONFIG_MAPPING[name](**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, **EAGER)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.float().eval().parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            near = 1.0 if parameter.ndim == 1 else 0.0  # norms; biases of 1 are as good as any
            parameter.copy_(near + noise * parameter.shape[-1] ** -0.5)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


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


@pytest.mark.parametrize(("name", "seed"), slow_but(DRAWS, lambda draw: draw == ("qwen3_next", 0)))
def test_a_drawn_configuration_is_that_of_transformers(name, seed, mesh_of, tmp_path, monkeypatch):
    fields, axes = drawn(name, seed)
    theirs = theirs_of(name, fields, seed)
    theirs.save_pretrained(tmp_path / "in")
    tokens = np.random.default_rng(seed).integers(0, TOKENS, (2, LENGTH))
    with_gradients = seed % 3 == 0
    theirs_32 = outputs(theirs, tokens, with_gradients)
    with in_float64(monkeypatch):
        expected = outputs(copy.deepcopy(theirs).double(), tokens, with_gradients)
    close = limit(expected[0], theirs_32[0], PARTS.get((name, seed), 1e-4))

    alone, _ = jaxcp.load(tmp_path / "in")
    found = jaxcp.logits(alone, tokens)
    np.testing.assert_allclose(found, expected[0], **close, err_msg=str(fields))
    jaxcp.save(alone, tmp_path / "again")
    assert jaxcp.load_config(tmp_path / "again") == alone.config
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("in", "again"))
    assert before.keys() == after.keys()
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=torch.float32, **EAGER
    )
    np.testing.assert_array_equal(outputs(again.eval(), tokens, False)[0], theirs_32[0])
    if with_gradients:
        wanted, theirs_32 = (
            as_ours(theirs, x[1], tmp_path / str(i)) for i, x in enumerate((expected, theirs_32))
        )
        for path, x in flat(gradients(alone, jnp.asarray(tokens, jnp.int32))).items():
            if "router_bias" not in path:
                far = limit(wanted[path], theirs_32[path], 5e-4)
                np.testing.assert_allclose(x, wanted[path], **far, err_msg=path)
    if axes:
        mesh_of(**axes)
        model, _ = jaxcp.load(tmp_path / "again")
        np.testing.assert_allclose(jaxcp.logits(model, tokens), expected[0], **close)


def outputs(theirs, tokens, with_gradients):
    """`(logits, gradients of the loss by parameter or none)`."""
    ids = torch.from_numpy(tokens)
    output = theirs(input_ids=ids, labels=ids, use_cache=False)
    if with_gradients:
        output.loss.backward()
    return output.logits.detach().numpy(), [p.grad for p in theirs.parameters()]


def limit(exact, theirs, part):
    """Distance from `exact` that a result in float32 may have."""
    exact, theirs = np.asarray(exact), np.asarray(theirs)
    return {"atol": max(part * np.abs(exact).max(), np.abs(theirs - exact).max()) + 1e-7, "rtol": 0}


def as_ours(theirs, grads, folder):
    """Gradients of their parameters by our names: saved as a checkpoint, and loaded."""
    with torch.no_grad():
        for parameter, grad in zip(theirs.parameters(), grads, strict=True):
            parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    theirs.save_pretrained(folder)
    return flat(jaxcp.load(folder)[0])


@contextlib.contextmanager
def in_float64(monkeypatch):
    """Make every float32 of their code float64."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-next-tiny", "qwen3-5-moe-tiny", "kimi-linear-tiny"])
def test_what_is_left_between_us_is_rounding(name, mesh_of, monkeypatch):
    """Logits in float32 are as near to those in float64 as the float32 ones of transformers are.

    Up to 1.9e-4 lie between the two float32 (Qwen3-Next 1.5e-4, Qwen3.5 1.9e-4, Kimi 0.8e-4, on any
    mesh): theirs of Qwen3-Next are 1.3e-4 from float64, of Qwen3.5 2.8e-4; ours 0.9e-4 and 1.9e-4
    or, with sums in another order, 2.9e-4. Of Kimi Linear both are within 1e-4.
    """
    reference = np.load(FIXTURES / name / "reference.npz")
    tokens = reference["input_ids"].astype(np.int64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURES / name, dtype=torch.float32, **EAGER
    )
    with in_float64(monkeypatch):
        exact, _ = outputs(theirs.eval().double(), tokens, False)
    assert exact.dtype == np.float64
    far = max(5e-5, np.abs(reference["logits"] - exact).max())
    assert far < 3e-4
    for axes in ({}, {"seq": 2}, {"seq": 3}, {"seq": 8}, {"model": 2}, {"expert": 2}):
        if axes:
            mesh_of(**axes)
        model, _ = jaxcp.load(FIXTURES / name)
        found = np.asarray(jaxcp.logits(model, tokens))
        np.testing.assert_allclose(found, exact, atol=1.25 * far, rtol=0, err_msg=str(axes))


@pytest.mark.slow
def test_each_layer_of_what_came_before_is_that_of_float64(tmp_path, monkeypatch):
    """Show where a token of the draw of `PARTS` goes astray, and that no layer of ours does it.

    Ours are 1.6e-5, 1.7e-4, 1.5e-4 and 2.9e-3 from float64 after each layer (layer 0 by 1e-6 where
    layer 1 is worst, token 63, which makes token 65 of layer 3 so). Given what ours was given, each
    layer of transformers in float64 is within 4e-5 of ours.
    """
    name, seed = next(iter(PARTS))
    theirs = theirs_of(name, drawn(name, seed)[0], seed)
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(seed).integers(0, TOKENS, (2, LENGTH))
    model, _ = jaxcp.load(tmp_path)
    ours = [np.asarray(x) for x in streams(model, jnp.asarray(tokens, jnp.int32))]
    exact, close = copy.deepcopy(theirs).double(), []
    with in_float64(monkeypatch), torch.no_grad():

        def listen(layer, arguments, options, output):
            del arguments
            i = len(close)
            again = layer.forward(torch.tensor(ours[i], dtype=torch.double), **options)
            close.append([np.abs(ours[i + 1] - x.numpy()).max() for x in (again, output)])

        for layer in exact.model.layers:
            layer.register_forward_hook(listen, with_kwargs=True)
        exact(input_ids=torch.from_numpy(tokens), use_cache=False)
    of_same, of_exact = np.array(close).T
    assert len(close) == 4 and of_same.max() < 1e-4
    assert of_exact[3] > 20 * of_same.max()


@jax.jit
def streams(model, tokens):
    """Give the input of the first layer, and the output of each."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = embed(model.embed, tokens, jnp.float32)
    found, attend = [x], model.attend_over(positions)
    for layer in model.layers:
        x, _ = layer(x, positions, attend)
        found.append(x)
    return found
