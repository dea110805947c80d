# SPDX-License-Identifier: Apache-2.0
"""A tiny chat model over bytes with the template of a published one, and answers forced on it."""

import json
import re

import jax
import numpy as np
from chat_folders import write_model
from flax import nnx

import jaxcp
from jaxcp.text.folder import read_tokenizer

MOST_TOKENS = 288


def tiny_chat_model(max_positions=1024):
    """A GPT whose answers vary: small embeddings would give one token for ever."""
    config = jaxcp.GPTConfig(
        vocab_size=MOST_TOKENS, max_positions=max_positions, num_layers=1, num_heads=2, embed_dim=16
    )
    model = jaxcp.GPT(config, rngs=nnx.Rngs(1))
    model.embed[...] = model.embed[...] * 20
    model.position_embed[...] = model.position_embed[...] * 20
    return model


def tiny_engine(tokenizer):
    """An engine over two shards, the same for whoever serves: its programs are compiled once."""
    with jax.set_mesh(jaxcp.make_mesh(seq=2, devices=jax.devices()[:2])):
        return jaxcp.Engine(
            tiny_chat_model(), tokenizer, max_len=1024, max_rows=4, pool_tokens=4096, max_wait=10,
            stop_tokens=tokenizer.chat.stop_tokens,
        )  # fmt: skip


def tokenizer_of(folder, kind="qwen3"):
    """The tokenizer of a model of `chat_folders`, with its template."""
    return read_tokenizer(write_model(folder / kind, kind))


def write_tiny_chat(folder, kind="qwen3", max_positions=1024):
    """A checkpoint folder with a random model, its tokenizer and template."""
    write_model(folder, kind)
    beside = {path.name: path.read_bytes() for path in folder.iterdir()}
    jaxcp.save(tiny_chat_model(max_positions), folder, None)
    for name, data in beside.items():
        if name not in ("config.json", "generation_config.json"):
            folder.joinpath(name).write_bytes(data)
    return folder


def saying(tokenizer, text):
    """A grammar by which a model says `text`; what is a control token there is one in its answer.

    The answer goes on after it until there are no tokens left, unless `text` ends a turn.
    """
    added = {x.content: i for i, x in tokenizer.backend.get_added_tokens_decoder().items()}
    parts = re.split("(" + "|".join(map(re.escape, added)) + ")", text)
    words = [f"<[{added[x]}]>" if x in added else json.dumps(x) for x in parts if x]
    return f"start: {' '.join(words)}"


def spread(rows, seed=0):
    """Random ids of bytes, `[rows]` prompts of 5 to 60 of them."""
    rng = np.random.default_rng(seed)
    return [rng.integers(97, 123, rng.integers(5, 60)).tolist() for _ in range(rows)]
