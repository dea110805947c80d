# SPDX-License-Identifier: Apache-2.0
"""Recurrent models of drawn configurations compute what the installed transformers computes.

A draw is over every field that the reader accepts and that changes a result; `jaxcp.save` then says
it again, and gradients are compared too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from slow import slow_but
from tiny_checkpoints import flat

import jaxcp

transformers = pytest.importorskip("transformers", reason="needs pip install jaxcp[hf]")
torch = pytest.importorskip("torch", reason="needs pip install jaxcp[hf]")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend

TOKENS, LENGTH = 48, 70
MESHES = {}, {"seq": 3}, {"seq": 4}, {"seq": 2, "model": 2}
NAMES = "qwen3_next", "qwen3_5_moe_text", "qwen3_5_text", "kimi_linear"
DRAWS = [(name, seed) for name in NAMES for seed in range(10)]


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
    heads, (count, per_tok, width) = int(rng.choice([2, 4])), experts_of(rng)
    dense = int(rng.integers(0, layers + 1))
    return {
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
    config = transformers.models.auto.CONFIG_MAPPING[name](**fields, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
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
def test_a_drawn_configuration_is_that_of_transformers(name, seed, mesh_of, tmp_path):
    fields, axes = drawn(name, seed)
    theirs = theirs_of(name, fields, seed)
    theirs.save_pretrained(tmp_path / "in")
    tokens = np.random.default_rng(seed).integers(0, TOKENS, (2, LENGTH))
    output = theirs(
        input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(tokens), use_cache=False
    )
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
        found = again.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    np.testing.assert_allclose(found, expected, **close)
    if seed % 3 == 0:
        compare_gradients(alone, theirs, output, tokens, tmp_path)
    if axes:
        mesh_of(**axes)
        model, _ = jaxcp.load(tmp_path / "again")
        np.testing.assert_allclose(jaxcp.logits(model, tokens), expected, **close)


def compare_gradients(ours, theirs, output, tokens, folder):
    """Theirs are saved as a checkpoint, so that they lie as ours do."""
    output.loss.backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            grad = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    theirs.save_pretrained(folder / "gradients")
    wanted = flat(jaxcp.load(folder / "gradients")[0])
    for path, x in flat(gradients(ours, jnp.asarray(tokens, jnp.int32))).items():
        if "router_bias" in path:
            continue
        limit = 5e-4 * np.abs(wanted[path]).max() + 1e-7  # both are float32
        np.testing.assert_allclose(x, wanted[path], atol=limit, rtol=0, err_msg=path)
