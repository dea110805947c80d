# SPDX-License-Identifier: Apache-2.0
"""A config.json without dtype, and heads that are tied or not."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_checkpoints import FIXTURES, assert_same, tensors, write

from jaxcp import load_config, models, weights

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FAMILIES = (
    *("gpt2", "hy3", "qwen3-moe", "gpt-oss", "deepseek-v3", "deepseek-v32", "deepseek-v4"),
    *("llama", "mistral", "qwen2", "qwen3"),
)


def cast(contents, dtype):
    """As a published file: biases that select experts stay float32."""
    return {k: v if k.endswith("expert_bias") else v.astype(dtype) for k, v in contents.items()}


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)], ids=str)
def test_the_dtype_of_the_tensors(dtype, tmp_path):
    """For a model whose config.json names none, or null: what it computes and caches in."""
    folder = write(tmp_path, "hy3-tiny", cast(tensors("hy3-tiny"), dtype), dtype=None)
    model, _ = weights.load(folder)
    assert load_config(folder).dtype == model.config.dtype == dtype.name
    cache = jax.eval_shape(lambda: model.init_cache(1, 32))
    floats = [x.dtype for x in jax.tree.leaves(cache) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and set(floats) == {dtype}
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_config(folder).dtype == dtype.name
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "torch.float16"}))
    assert load_config(folder).dtype == "float16"  # what it says stands


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_dtype_where_there_are_no_tensors(family, tmp_path):
    """bfloat16, but for GPT-2; never float32 because nobody said anything."""
    fields = json.loads((FIXTURES / f"{family}-tiny/config.json").read_text())
    fields.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    expected = "float32" if family == "gpt2" else "bfloat16"
    assert load_config(tmp_path).dtype == models.config_from_dict(fields).dtype == expected
    index = {"weight_map": {"a": "not-yet-copied.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_config(tmp_path).dtype == expected
    for wrong in ("float64", "int8", 32, ["bfloat16"]):
        with pytest.raises(NotImplementedError, match="dtype must be one of float32, bfloat16"):
            models.config_from_dict(fields | {"dtype": wrong})


@jax.jit
def hidden_and_logits(model, tokens):
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = model.hidden(tokens, positions)[0]
    return hidden, model.logits(hidden)


def test_a_tied_head(tmp_path):
    before, name, tied = tensors("qwen3-moe-tiny"), "qwen3-moe-tiny", {"tie_word_embeddings": True}
    head, table = before.pop("lm_head.weight"), before["model.embed_tokens.weight"]
    model, _ = weights.load(write(tmp_path / "in", name, before, **tied))
    hidden, logits = hidden_and_logits(model, np.arange(12)[None])
    np.testing.assert_allclose(logits, np.float64(hidden) @ table.T, atol=1e-4, rtol=0)
    weights.save(model, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == before.keys()
    assert load_config(tmp_path / "out") == model.config and model.config.tie_embeddings
    again = before | {"lm_head.weight": table}  # some files repeat it
    assert_same(model, weights.load(write(tmp_path / "in", name, again, **tied))[0])
    for contents, fields, message in (
        (before | {"lm_head.weight": head}, tied, r"ties it to:\n    lm_head\.weight"),
        (before, {}, r"1 missing:\n    lm_head\.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.load(write(tmp_path / "in", name, contents, **fields))


def test_an_untied_head_of_gpt2(tmp_path):
    before, untied = tensors("gpt2-tiny"), {"tie_word_embeddings": False}
    head = np.random.default_rng(0).normal(size=before["transformer.wte.weight"].shape)
    contents = before | {"lm_head.weight": head.astype(np.float32)}
    model, _ = weights.load(write(tmp_path / "in", "gpt2-tiny", contents, **untied))
    hidden, logits = hidden_and_logits(model, np.arange(12)[None])
    np.testing.assert_allclose(logits, np.float64(hidden) @ head.T, atol=1e-4, rtol=0)
    weights.save(model, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == contents.keys()
    assert_same(model, weights.load(tmp_path / "out")[0])
    with pytest.raises(ValueError, match=r"1 missing:\n    lm_head\.weight"):
        weights.load(write(tmp_path / "in", "gpt2-tiny", before, **untied))
