# SPDX-License-Identifier: Apache-2.0
"""The layer of GLM-4.5 that drafts, as the transformers that is installed computes it.

It embeds the first token of a draft where we, as vLLM, embed nothing: theirs is given nothing too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_checkpoints import FIXTURES, tensors, write

import jaxcp
from jaxcp.data.lookahead import following

transformers = pytest.importorskip("transformers", reason="needs pip install jaxcp[hf]")
torch = pytest.importorskip("torch", reason="needs pip install jaxcp[hf]")
layers = pytest.importorskip("transformers.modeling_layers")
pytestmark = [
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
    pytest.mark.skipif(not hasattr(layers, "MtpLayer"), reason="needs a newer transformers"),
]
NAME, LAYER = "glm4-moe-tiny", "model.layers.4."


def drafting_layer(main):
    """Their layer with random weights, near one where they are norms."""
    block = main.model.layers[-1]
    layer = layers.MtpLayer(main.config, type(block), type(block.input_layernorm), layer_idx=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in (*layer.parameters(), *layer.buffers()):
            noise = torch.randn(values.shape, generator=generator) * values.shape[-1] ** -0.5
            values.copy_(noise + (values.ndim == 1))
    return layer.float().eval()


def named(layer):
    """Its tensors as the hub has them, and the copies of embedding and head."""
    names = {k: v.detach().numpy() for k, v in layer.state_dict().items()}
    names = {k.replace("mtp_block.", "").replace("post_norm", "shared_head.norm"): v
             for k, v in names.items()}  # fmt: skip
    main = tensors(NAME)
    names |= {"embed_tokens.weight": main["model.embed_tokens.weight"]}
    names |= {"shared_head.head.weight": main["lm_head.weight"]}
    return {f"{LAYER}{k}": v for k, v in names.items()}


def drafts(main, layer, ids, after):
    """Logits of the token after next."""
    positions = torch.arange(ids.shape[1])[None]
    unseen = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        hidden = main.model(ids).last_hidden_state
        embedded = main.model.embed_tokens(after)
        embedded[:, 0] = 0
        turns = main.model.rotary_emb(hidden, position_ids=positions)
        out = layer(embedded, hidden, turns, unseen, positions, None)
        return main.lm_head(out).numpy()


def test_drafts_are_those_of_transformers(tmp_path):
    main = transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURES / NAME, attn_implementation="eager", dtype=torch.float32
    ).eval()
    layer = drafting_layer(main)
    contents = tensors(NAME) | named(layer)
    folder = write(tmp_path / "in", NAME, contents, num_nextn_predict_layers=1)
    model, _ = jaxcp.load(folder)
    assert model.config.num_mtp_layers == 1

    ids = np.load(FIXTURES / NAME / "reference.npz")["input_ids"]
    after = following(ids, 1)
    expected = drafts(main, layer, torch.from_numpy(ids), torch.from_numpy(after[..., 0]).long())
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    tokens = jnp.asarray(ids, jnp.int32)
    found = jax.jit(lambda m: m.mtp_logits(tokens, jnp.asarray(after, jnp.int32), positions))(model)
    np.testing.assert_allclose(found[0], expected, atol=1e-4, rtol=0)

    jaxcp.save(model, tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == contents.keys()
    assert all(again[k].tobytes() == np.ascontiguousarray(contents[k]).tobytes() for k in again)
